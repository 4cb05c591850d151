from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, Draft, begin
from flashgen.cli.app import app
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.recipe.load import load


def flashgen(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make(out: Path, kind: Any = "student", text: str = "w", **changes: Any) -> Artifact:
    inputs: dict[str, Any] = {"stage": "distill", "recipe": {"steps": 4}, "seed": 0, "parents": []}
    draft = begin(out, kind=kind, **(inputs | changes))
    if isinstance(draft, Draft):
        (draft.path / "transformer").mkdir()
        (draft.path / "transformer" / "w.safetensors").write_text(text)
        return draft.publish(metrics={"composition": 0.9})
    return draft


def fake_stage(monkeypatch: pytest.MonkeyPatch, name: str, run: Any, function: str = "run") -> ModuleType:
    module = ModuleType(f"flashgen.stages.{name}")
    setattr(module, function, run)
    monkeypatch.setitem(sys.modules, f"flashgen.stages.{name}", module)
    return module


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stage that records its arguments and publishes a few bytes, in the place of `quantize`."""

    def run(student: str, out: Path, recipe: Any, seed: int, force: bool) -> Artifact:
        module.__dict__["seen"] = {"student": student, "out": out, "group": recipe.quantize.group, "seed": seed}
        return make(out, "quantized", stage="quantize", seed=seed, force=force)

    module = fake_stage(monkeypatch, "quantize", run)
    return module


# the result


def test_stage_prints_only_the_new_versions_path(tmp_path: Path, stage: ModuleType) -> None:
    result = flashgen("quantize", "student", "--out", tmp_path / "q", "--seed", "3", "--set", "quantize.group=32")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'q' / 'v0001'}\n"
    assert stage.seen == {"student": "student", "out": tmp_path / "q", "group": 32, "seed": 3}


def test_json_is_one_object_with_the_documented_keys(tmp_path: Path, stage: ModuleType) -> None:
    result = flashgen("quantize", "student", "--out", tmp_path, "--json")
    record = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert list(record) == ["artifact", "stage", "version", "seconds", "peak_rss_mib", "metrics"]
    assert (record["artifact"], record["stage"], record["version"]) == (str(tmp_path / "v0001"), "quantize", "v0001")
    assert record["metrics"] == {"composition": 0.9}
    assert record["seconds"] >= 0
    assert 10 < record["peak_rss_mib"] < 100_000


def test_the_same_command_again_is_up_to_date_and_force_is_not(tmp_path: Path, stage: ModuleType) -> None:
    first, again = flashgen("quantize", "s", "-o", tmp_path), flashgen("quantize", "s", "-o", tmp_path)
    assert again.stdout == first.stdout
    assert "up to date" in again.stderr
    assert "up to date" not in first.stderr
    assert flashgen("quantize", "s", "-o", tmp_path, "--force").stdout == f"{tmp_path / 'v0002'}\n"


def test_plan_starts_nothing_and_names_inputs_output_and_recipe(tmp_path: Path, stage: ModuleType) -> None:
    student = make(tmp_path / "s", text="w" * 10)
    result = flashgen("quantize", tmp_path / "s", "-o", tmp_path / "q", "--set", "quantize.group=32", "--plan", "--json")
    planned = json.loads(result.stdout)
    assert planned["inputs"] == [
        {"role": "student", "path": str(student.path), "kind": "student", "digest": student.manifest.digest, "bytes": 10}
    ]
    assert (planned["disk_bytes"], planned["memory_bytes"], planned["out"]) == (None, None, str(tmp_path / "q"))  # it has no networks
    assert planned["recipe"]["quantize"]["group"] == 32
    assert not hasattr(stage, "seen")
    assert not (tmp_path / "q").exists()


COMMON = {"out": Path("x"), "force": False}


@pytest.mark.parametrize(
    ("command", "target", "inputs", "given"),
    [
        ("restructure-encoder s --mode prune", "restructure.run", ("s",), {"seed": 0, "mode": "prune"}),
        ("export s --seed 4", "export.run", ("s",), {"seed": 4, "target": "onnx", "offline": False}),
        ("export s --target web --offline", "export.run", ("s",), {"seed": 0, "target": "web", "offline": True}),
        ("distill s", "distill.run", ("s",), {"seed": 0}),
        ("finetune s", "finetune.run", ("s",), {"seed": 0}),
        ("teacher train", "teacher.train", (), {"seed": 0}),
        ("teacher random --like tiny", "teacher.random", (), {"seed": 0, "like": "tiny", "layers": None}),
        ("teacher random --like tiny --layers 1", "teacher.random", (), {"seed": 0, "like": "tiny", "layers": 1}),
        ("teacher import folder", "teacher.import_", ("folder",), {}),
    ],
)
def test_each_command_calls_its_stage_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, target: str, inputs: tuple[str, ...], given: dict[str, Any]
) -> None:
    seen: list[Any] = []

    def run(*inputs: str, **given: Any) -> Artifact:
        seen.append((inputs, given))
        return make(tmp_path)

    name, function = target.split(".")
    fake_stage(monkeypatch, name, run, function)
    assert flashgen(*command.split(), "-o", "x").exit_code == 0
    recipe = {} if command.startswith(("teacher random", "teacher import")) else {"recipe": load("shapes-demo")}
    assert seen == [(inputs, COMMON | recipe | given)]


# errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("steps: too many"), 2, "error: steps: too many"),
        (ArtifactError("v is broken"), 3, "error: v is broken"),
        (NumericsError("loss is nan"), 4, "error: loss is nan"),
        (MachineError("too little disk"), 5, "error: too little disk"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w.safetensors"), 5, "no space left on the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 5, "Permission denied: '/x'; check the path"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            5,
            'needs torch, which is not installed: pip install "flashgen[train]"',
        ),
        (
            ImportError("T5Tokenizer requires sentencepiece"),
            5,
            'requires sentencepiece, which is not installed: pip install "flashgen[train]"',
        ),
        (MemoryError(), 5, "not enough memory"),
        (ModuleNotFoundError("No module named 'flashgen.x'", name="flashgen.x"), 1, "unexpected ModuleNotFoundError"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero; run again with --debug"),
        (KeyboardInterrupt(), 130, "the same command resumes"),
    ],
)
def test_error_is_one_sentence_and_its_exit_code(tmp_path: Path, stage: ModuleType, error: BaseException, code: int, message: str) -> None:
    def run(*_: Any, **__: Any) -> Artifact:
        raise error

    stage.run = run  # type: ignore[attr-defined]
    result = flashgen("quantize", "s", "-o", tmp_path / "q")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    debugged = flashgen("quantize", "s", "-o", tmp_path / "q", "--debug")
    assert debugged.exit_code == code
    assert "Traceback" in debugged.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "s"], "--out"),
        (["quantize", "-o", "q"], "STUDENT"),
        (["quantize", "s", "-o", "q", "--sead", "1"], "--sead"),
        (["quantize", "s", "-o", "q", "--seed", "-1"], "--seed"),
        (["quantize", "s", "-o", "q", "--device", "tpu"], "'auto', 'cpu', 'cuda', 'mps'"),
        (["quantize", "s", "-o", "q", "--set", "quantize.bits=5"], "--set quantize.bits=5: quantize.bits"),
        (["quantize", "s", "-o", "q", "--recipe", "none"], "no recipe named 'none'"),
        (["quantize", "s", "-o", "q", "--device", "cuda"], "computes on the CPU only"),
        (["restructure-encoder", "s", "-o", "q", "--mode", "melt"], "'zeros', 'prune', 'compact'"),
        (["export", "s", "-o", "q", "--target", "toaster"], "'onnx', 'gguf', 'web'"),
        (["generate", "a", "a red circle", "-o", "x", "--steps", "0"], "--steps"),
        (["generate", "a", "a red circle", "-o", "x", "--guidance", "0.5"], "--guidance"),
        (["generate", "a", "-o", "x"], "PROMPT"),
        (["bench", "a", "--per-task", "0"], "--per-task"),
        (["bench", "a", "--set", "bench=3"], "--set bench=3: bench"),
        (["import"], "No such command"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: ModuleType, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = flashgen(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.parametrize("command", [["show"], ["bench"], ["generate", "--out", "x.png"]])
def test_a_missing_artifact_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = flashgen(*command, "none", *(["a red circle"] if command[0] == "generate" else []))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no artifact at none" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_altered_file_ends_with_3_when_shown_with_verify(tmp_path: Path) -> None:
    (make(tmp_path, text="good").path / "transformer/w.safetensors").write_text("evil")
    assert flashgen("show", tmp_path).exit_code == 0
    result = flashgen("show", tmp_path, "--verify")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "transformer/w.safetensors was altered" in result.stderr


def test_one_option_spelling_for_every_stage() -> None:
    for command in ("distill", "finetune", "restructure-encoder", "quantize", "export", "teacher train"):
        text = flashgen(*command.split(), "--help").stdout
        for option in ("--out", "--recipe", "--set", "--seed", "--device", "--plan", "--force", "--json", "--debug"):
            assert f"{option} " in text, (command, option)


# show


def test_show_json_is_the_manifest_with_parents(tmp_path: Path) -> None:
    teacher = make(tmp_path / "t", "teacher")
    student = make(tmp_path / "s", parents=[teacher.as_parent("teacher")])
    shown = json.loads(flashgen("show", tmp_path / "s", "--json").stdout)
    assert shown == json.loads((student.path / "manifest.json").read_text())
    assert shown["parents"] == [{"role": "teacher", "path": str(teacher.path), "digest": teacher.manifest.digest}]


def test_show_prints_the_lineage_and_marks_what_is_gone(tmp_path: Path) -> None:
    teacher = make(tmp_path / "t", "teacher")
    student = make(tmp_path / "s", parents=[teacher.as_parent("teacher")])
    make(tmp_path / "q", "quantized", parents=[student.as_parent("student")])
    text = flashgen("show", tmp_path / "q", "--verify").stdout
    assert f"student {student.path}" in text
    assert f"teacher {teacher.path}" in text
    assert "digests checked" in text
    assert "no longer there" not in text
    (teacher.path / "manifest.json").unlink()
    assert f"teacher {teacher.path}  {teacher.manifest.digest[:12]}  (no longer there)" in flashgen("show", tmp_path / "q").stdout


def test_show_ends_when_a_lineage_names_itself(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    manifest = artifact.manifest.model_copy(update={"parents": [artifact.as_parent("student")]})
    (artifact.path / "manifest.json").write_text(manifest.model_dump_json())
    result = flashgen("show", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.count(artifact.manifest.digest[:12]) == 3  # its digest, itself, and once as its own parent


# generate and bench, around their stages


def test_generate_hands_over_its_options_and_prints_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "d", "device")
    seen: dict[str, Any] = {}

    def run(artifact: str, prompts: list[str], out: Path, **given: Any) -> list[Path]:
        seen.update(given, artifact=artifact, prompts=prompts)
        return [out / f"{i}.png" for i in range(len(prompts))]

    fake_stage(monkeypatch, "generate", run)
    command = ["generate", str(tmp_path / "d"), "one", "two", "--out", "x", "--seed", "7", "--size", "64", "--steps", "2"]
    assert flashgen(*command).stdout == "x/0.png\nx/1.png\n"
    assert seen == {
        "artifact": str(tmp_path / "d"),
        "prompts": ["one", "two"],
        "seed": 7,
        "steps": 2,
        "guidance": None,
        "size_px": 64,
        "negative": None,
        **{"batch": 8, "init_image": None, "strength": 0.8, "contact_sheet": False, "engine": "auto", "preview": False, "memory": None},
    }
    record = json.loads(flashgen(*command, "--json").stdout)
    assert (record["images"], record["stage"], record["artifact"]) == (["x/0.png", "x/1.png"], "generate", str(tmp_path / "d/v0001"))


def test_bench_prints_its_report_as_json_or_the_folder_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stage(monkeypatch, "bench", lambda artifacts, out, recipe, seed, per_task: {"results": [], "seen": [artifacts, seed, per_task]})
    result = flashgen("bench", "a", "b", "--json", "--per-task", "3", "--seed", "5")
    assert json.loads(result.stdout) == {"results": [], "seen": [["a", "b"], 5, 3]}
    assert flashgen("bench", "a").stdout == ""
    assert flashgen("bench", "a", "--out", "report").stdout == "report\n"


def test_generate_refuses_what_the_artifact_cannot_do_before_it_loads_a_network(tmp_path: Path) -> None:
    draft = begin(tmp_path / "d", kind="device", stage="export", recipe={}, seed=0, parents=[])
    assert isinstance(draft, Draft)
    sizes: dict[str, Any] = {"clip_tokens": 16, "t5_tokens": 16, "size_px": 64}
    draft.publish(sampler=Sampler(sigmas=[1, 0.5, 0], shift=3, guidance=1, encoder="full", trained_steps=[2], **sizes))
    for arguments, message in (
        (["a red circle", " "], "prompt is empty"),
        (["a red circle", "--steps", "3"], "--steps 3"),
        (["a red circle", "--size", "65"], "--size 65"),
        (["a red circle", "--device", "cuda"], "--device cuda"),
    ):
        result = flashgen("generate", tmp_path / "d", *arguments, "-o", tmp_path / "x.png")
        assert (result.exit_code, result.stdout) == (2, ""), result.stderr
        assert message in result.stderr
    assert not (tmp_path / "x.png").exists()
