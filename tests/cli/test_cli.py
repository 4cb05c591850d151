"""What every command has in common: one result on stdout, exit codes, one sentence per error. The stage is a small real one."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from flashgen.artifact.manifest import Parent, content_digest
from flashgen.artifact.store import Artifact
from flashgen.cli.app import main
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.recipe.schema import Recipe
from flashgen.stages.card import ancestors
from flashgen.stages.inputs import teacher_of
from tests.artifact.making import publish
from tests.cli.command import flashgen, refused
from tests.conftest import tiny_sampler
from tests.stages.copying import Copy


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`flashgen quantize` runs the stage `Copy`."""
    module = ModuleType("flashgen.stages.quantize")
    module.Quantize = Copy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Copy.made.clear()
    yield
    Copy.error, Copy.refusal, Copy.needs = None, None, None


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    return publish(tmp_path / "student", world="shapes")


# the result


def test_stage_prints_only_the_new_versions_path(tmp_path: Path, student: Artifact) -> None:
    result = flashgen("quantize", tmp_path / "student", "--out", tmp_path / "q", "--seed", "3", "--set", "quantize.bits=8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'q' / 'v0001'}\n"
    manifest = json.loads((tmp_path / "q" / "v0001" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["recipe"], manifest["parents"][0]["path"]) == (3, {"bits": 8}, str(student.path))


def test_json_is_one_object_with_the_documented_keys(tmp_path: Path, student: Artifact) -> None:
    result = flashgen("quantize", student.path, "--out", tmp_path / "q", "--json")
    record = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert list(record) == ["artifact", "stage", "version", "seconds", "peak_rss_mib", "metrics"]
    assert (record["artifact"], record["stage"], record["version"]) == (str(tmp_path / "q" / "v0001"), "copy", "v0001")
    assert record["metrics"] == {"letters": 1}
    assert record["seconds"] >= 0
    assert 10 < record["peak_rss_mib"] < 100_000


def test_the_same_command_again_is_up_to_date_and_force_is_not(tmp_path: Path, student: Artifact) -> None:
    command = ("quantize", student.path, "-o", tmp_path / "q")
    first, again = flashgen(*command), flashgen(*command)
    assert again.stdout == first.stdout
    assert "up to date" in again.stderr
    assert "up to date" not in first.stderr
    assert flashgen(*command, "--force").stdout == f"{tmp_path / 'q' / 'v0002'}\n"
    record = json.loads(flashgen(*command, "--json").stdout)
    assert (record["version"], record["metrics"]) == ("v0002", {"letters": 1})


def test_plan_starts_nothing_and_names_inputs_output_and_recipe(tmp_path: Path, student: Artifact) -> None:
    command = ("quantize", tmp_path / "student", "-o", tmp_path / "q", "--set", "quantize.group=32", "--seed", "4", "--plan")
    planned = json.loads(flashgen(*command, "--json").stdout)
    assert planned["inputs"] == [
        {"role": "student", "path": str(student.path), "kind": "student", "digest": student.manifest.digest, "bytes": 9}
    ]
    assert (planned["stage"], planned["seed"]) == ("copy", 4)
    assert (planned["disk_bytes"], planned["memory_bytes"], planned["out"]) == (None, None, str(tmp_path / "q"))  # this stage has no plan
    assert planned["recipe"]["quantize"]["group"] == 32
    assert Copy.made == [] and not (tmp_path / "q").exists()
    assert json.loads(flashgen(*command).stdout) == planned and flashgen(*command).stdout.count("\n") > 10


def test_a_rank_without_a_launch_prints_as_any_process(tmp_path: Path, student: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert flashgen("quantize", student.path, "-o", tmp_path / "q").stdout == f"{tmp_path / 'q' / 'v0001'}\n"
    assert "no artifact at" in refused(3, "quantize", tmp_path / "none", "-o", tmp_path / "q")


# errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("steps: too many"), 2, "error: steps: too many"),
        (ArtifactError("v is broken"), 3, "error: v is broken"),
        (NumericsError("loss is nan"), 4, "error: loss is nan"),
        (MachineError("too little disk"), 5, "error: too little disk"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w.safetensors"), 5, "q is full ("),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "q is full ("),
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
def test_error_is_one_sentence_and_its_exit_code(tmp_path: Path, student: Artifact, error: BaseException, code: int, message: str) -> None:
    Copy.error = error
    command = ("quantize", student.path, "-o", tmp_path / "q")
    result = flashgen(*command)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    debugged = flashgen(*command, "--debug")
    assert debugged.exit_code == code
    assert "Traceback" in debugged.stderr
    Copy.error = None
    assert flashgen(*command).exit_code == 0  # nothing stays locked
    assert Copy.made == [[], ["checkpoint"], ["checkpoint"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "s"], "--out"),
        (["quantize", "-o", "q"], "STUDENT"),
        (["quantize", "s", "-o", "q", "--sead", "1"], "--sead"),
        (["quantize", "s", "-o", "q", "--seed", "-1"], "--seed"),
        (["quantize", "s", "-o", "q", "--device", "tpu"], "--device tpu: use auto, cpu, cuda, cuda:N or mps"),
        (["quantize", "s", "-o", "q", "--set", "quantize.bits=5"], "--set quantize.bits=5: quantize.bits"),
        (["quantize", "s", "-o", "q", "--recipe", "none"], "no recipe named 'none'"),
        (["export", "s", "-o", "q", "--device", "cuda"], "--device cuda: export computes on the CPU"),
        (["quantize", "s", "-o", "q", "--set", "quantize.repair=true"], "quantize.repair is now called quantize.step_scales; write that"),
        (["quantize", "s", "-o", "q", "--set", "distill.t5_drop=0"], "distill.t5_drop is now called distill.encoder_drop; write that"),
        (["quantize", "s", "-o", "q", "--set", "family=flux"], "recipe shapes-demo is for the model family flux, s/v0001 is of sd3"),
        (["quantize", "s", "-o", "q", "--set", "distill.strides=[1]"], "strides=[] makes them even\n"),
        (["quantize", "s", "-o", "s/v0001"], "--out s/v0001 is a published version"),
        (["quantize", "s", "-o", "s/v0001/model_index.json"], "is a file; name a folder that may hold versions"),
        (["restructure-encoder", "s", "-o", "q", "--mode", "melt"], "'zeros', 'prune', 'compact'"),
        (["export", "s", "-o", "q", "--target", "toaster"], "toaster"),
        (["generate", "s", "a red circle", "-o", "x", "--steps", "0"], "--steps"),
        (["generate", "s", "a red circle", "-o", "x", "--guidance", "0.5"], "--guidance"),
        (["generate", "s", "-o", "x"], "PROMPT"),
        (["generate", "s", "a red circle", "-o", "x", "--size", "big"], "--size: 'big' is not a picture size; write 512 for a square, or"),
        (["generate", "s", "a red circle", "-o", "x", "--size", "64x"], "--size: '64x' is not a picture size"),
        (["generate", "s", "a red circle", "-o", "x", "--size", "0"], "--size: picture sides must be 1 to"),
        (["generate", "s", "a red circle", "-o", "x", "--size", "99999x64"], "--size: picture sides must be 1 to"),
        (["generate", "s", "a red circle", "-o", "x", "--seeds", "3-1"], "--seeds 3-1: numbers and rising ranges"),
        (["generate", "s", "a red circle", "-o", "x", "--from-png", "x.png"], "--from-png brings prompt, seed"),
        (["bench", "s", "--per-task", "0"], "--per-task"),
        (["bench", "s", "--set", "bench=3"], "--set bench=3: bench"),
        (["bench", "s", "--engine", "tensorrt"], "--engine tensorrt is unknown; use one of: onnxruntime, onnxruntime:cuda"),
        (["bench"], "ARTIFACT"),
        (["import"], "No such command"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    publish(tmp_path / "s", world="shapes")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = flashgen(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


@pytest.mark.parametrize(
    "command", [["show"], ["bench"], ["generate", "--out", "x.png"], ["quantize", "--out", "q"], ["distill", "--out", "q"]]
)
def test_a_missing_artifact_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(3, *command, "none", *(["a red circle"] if command[0] == "generate" else []))
    assert "no artifact at none" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "change"),
    [
        (["quantize", "--out", "q"], {"family": "flux"}),
        (["quantize", "--out", "q", "--recipe", "shapes-demo"], {"family": "flux"}),
        (["generate", "a dog", "--out", "x.png", "--size", "128"], {"family": "flux"}),
        (["quantize", "--out", "q"], {"world": "letters"}),
        (["quantize", "--out", "q", "--recipe", "shapes-demo"], {"world": "letters"}),
        (["bench"], {"world": "letters"}),
    ],
)
def test_an_unknown_family_or_world_ends_with_3(
    command: list[str], change: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "s", sampler=tiny_sampler(), **{"world": "shapes", **change})
    monkeypatch.chdir(tmp_path)
    told = refused(3, command[0], "s", *command[1:])
    ((name, value),) = change.items()
    assert f"{name} '{value}' is not known here (known: " in told and told.count(";") == 1
    assert flashgen("show", "s").exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_altered_file_ends_with_3_when_shown_with_verify(tmp_path: Path) -> None:
    (publish(tmp_path, "good").path / "vae/w.safetensors").write_text("evil")
    assert flashgen("show", tmp_path).exit_code == 0
    assert "vae/w.safetensors was altered" in refused(3, "show", tmp_path, "--verify")


def test_one_option_spelling_for_every_stage() -> None:
    for command in ("distill", "finetune", "restructure-encoder", "quantize", "export", "teacher train"):
        text = flashgen(*command.split(), "--help").stdout
        for option in ("--out", "--recipe", "--set", "--seed", "--device", "--plan", "--force", "--json", "--debug"):
            assert f"{option} " in text, (command, option)


@pytest.mark.parametrize("where", [["a cat \udcff"], ["a cat", "--negative", "\udcff", "--guidance", "2"], ["a cat \ud800"]])
def test_a_prompt_that_is_no_utf8_ends_with_2_before_anything_loads(where: list[str], tmp_path: Path) -> None:
    publish(tmp_path / "s", sampler=tiny_sampler())  # which has no network that could load
    assert "is not valid UTF-8" in refused(2, "generate", tmp_path / "s", *where, "-o", tmp_path / "a.png")


def test_parents_that_go_round_in_a_circle_end(tmp_path: Path) -> None:
    artifact = publish(tmp_path)
    circle = replace(artifact, manifest=artifact.manifest.model_copy(update={"parents": [artifact.as_parent("student")]}))
    (artifact.path / "manifest.json").write_text(circle.manifest.model_dump_json())
    with pytest.raises(ArtifactError, match="go round in a circle"):
        teacher_of(circle)
    assert len(ancestors(Copy({"student": circle}, Recipe(name="test"), 0))) == 1


# show


def test_show_json_is_the_manifest_with_parents(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "t", kind="teacher")
    student = publish(tmp_path / "s", parents=[teacher.as_parent("teacher")])
    shown = json.loads(flashgen("show", tmp_path / "s", "--json").stdout)
    assert shown == json.loads((student.path / "manifest.json").read_text())
    assert shown["parents"] == [{"role": "teacher", "path": str(teacher.path), "digest": teacher.manifest.digest}]


def test_show_prints_the_lineage_and_marks_what_is_gone(tmp_path: Path) -> None:
    teacher = publish(tmp_path / "t", kind="teacher", world="shapes")
    student = publish(tmp_path / "s", parents=[teacher.as_parent("teacher")])
    publish(tmp_path / "q", kind="quantized", parents=[student.as_parent("student")])
    text = flashgen("show", tmp_path / "q", "--verify").stdout
    assert f"student {student.path}" in text
    assert f"teacher {teacher.path}" in text
    assert "digests checked" in text
    assert "no longer there" not in text
    assert "family   sd3; world none\n" in text and "family   sd3; world shapes\n" in flashgen("show", tmp_path / "t").stdout
    (teacher.path / "manifest.json").unlink()
    assert f"teacher {teacher.path}  {teacher.manifest.digest[:12]}  (no longer there)" in flashgen("show", tmp_path / "q").stdout


def test_show_knows_the_source_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for source in (str(tmp_path / "plain"), "hf:owner/name"):
        publish(tmp_path / "t", kind="teacher", parents=[Parent(role="source", path=source, digest="0" * 64)], settings={"import": source})
        text = flashgen("show", tmp_path / "t").stdout
        assert f"source {source}  {'0' * 12}\n" in text and "no longer there" not in text
    publish(tmp_path / "t", kind="teacher", parents=[Parent(role="source", path=str(tmp_path / "gone"), digest="0" * 64)])
    assert "gone  000000000000  (no longer there)" in flashgen("show", tmp_path / "t").stdout


def test_escape_codes_of_a_manifest_never_reach_the_terminal(tmp_path: Path) -> None:
    code = "\x1b]0;title\x07\x9b2J\u202e"
    parents = [Parent(role="teacher", path=code, digest="0" * 64)]
    publish(tmp_path / "s", stage=f"distill{code}", settings={"a": code}, parents=parents)
    shown = flashgen("show", tmp_path / "s")
    assert shown.exit_code == 0 and r"distill\x1b]0;title\x07\x9b2J\u202e" in shown.stdout
    assert not set(code[:1] + code[-4:]) & set(shown.stdout) - set("2J")
    manifest = tmp_path / "s" / "v0001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kind": "student"', json.dumps({"kind": code})[1:-1]))
    assert "\x1b" not in refused(3, "show", tmp_path / "s")
    assert "\x1b" not in refused(3, "show", tmp_path / code)


def test_show_walks_a_long_line_of_ancestors(tmp_path: Path) -> None:
    """1,100 versions: more than Python calls deep."""
    first = publish(tmp_path)
    parents: list[dict[str, str]] = []
    for number in range(2, 1102):
        folder = tmp_path / f"v{number:04d}"
        folder.mkdir()
        (folder / "a").write_text("")
        raw = first.manifest.model_dump(mode="json") | {"parents": parents, "files": [{"path": "a", "size": 0, "sha256": f"{number:064d}"}]}
        raw["digest"] = content_digest(raw)
        (folder / "manifest.json").write_text(json.dumps(raw))
        parents = [{"role": "student", "path": str(folder), "digest": raw["digest"]}]
    result = flashgen("show", tmp_path / "v1101")
    assert result.exit_code == 0 and result.stdout.count("\n") == 8 + 1100 and "no longer" not in result.stdout


def test_show_ends_when_a_lineage_names_itself(tmp_path: Path) -> None:
    artifact = publish(tmp_path)
    manifest = artifact.manifest.model_copy(update={"parents": [artifact.as_parent("student")]})
    (artifact.path / "manifest.json").write_text(manifest.model_dump_json())
    result = flashgen("show", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.count(artifact.manifest.digest[:12]) == 3  # its digest, itself, and once as its own parent


def test_a_request_to_end_cleans_up_like_an_interrupt(
    student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Copy, "make", lambda self, draft: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["flashgen", "quantize", str(student.path), "-o", str(tmp_path / "q")])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143 and "interrupted; nothing half-written was published" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_before_a_command_begins_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashgen.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err
