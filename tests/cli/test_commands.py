"""Every command on real tiny artifacts: which stage it prepares with which options, what it plans, and what it refuses before work.

The whole chain runs through the command line in tests/stages/conftest.py.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashgen.artifact.store import Artifact, open_artifact
from flashgen.recipe.load import load
from flashgen.stages import base
from flashgen.stages.base import Stage
from tests import runs
from tests.cli.command import flashgen, made_by, planned_by, refused

DEMO = ("--recipe", "shapes-demo")


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, tiny_student: Artifact) -> list[tuple[Stage, Path, bool]]:
    """(stage, out, force) of each run: everything is prepared, nothing runs."""
    seen = list[tuple[Stage, Path, bool]]()

    def execute(stage: Stage, out: Path, force: bool = False) -> Artifact:
        seen.append((stage, out, force))
        return tiny_student

    monkeypatch.setattr(base, "execute", execute)
    return seen


@pytest.fixture
def linked_student(tiny_teacher: Artifact, tiny_student: Artifact, tmp_path: Path) -> Artifact:
    """The tiny student with the tiny teacher as its parent, as distill publishes it."""
    from flashgen.artifact.draft import Origin, begin

    draft = begin(tmp_path / "distilled", Origin("student", "distill", "sd3", "shapes", {}, 0, [tiny_teacher.as_parent("teacher")]))
    draft.link_tree(tiny_student.path, ".")
    return draft.publish(sampler=tiny_student.manifest.sampler)


@pytest.mark.parametrize(
    ("command", "stage", "fields"),
    [
        ("distill TEACHER", "distill", {}),
        ("finetune STUDENT", "finetune", {}),
        ("restructure-encoder STUDENT --mode zeros", "restructure", {"mode": "zeros"}),
        ("restructure-encoder STUDENT --mode compact", "restructure", {"mode": "compact"}),
        ("quantize STUDENT", "quantize", {}),
        ("export STUDENT", "export", {"target": "onnx", "offline": False}),
        ("export TEACHER --target gguf", "export", {"target": "gguf", "offline": False}),
        ("export STUDENT --target web --offline", "export", {"target": "web", "offline": True}),
        ("teacher train", "train", {}),
    ],
)
def test_each_command_prepares_its_stage_with_its_options(
    command: str, stage: str, fields: dict[str, Any], tiny_teacher: Artifact, linked_student: Artifact,
    executed: list[tuple[Stage, Path, bool]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "web" in command:
        from flashgen.export import page

        monkeypatch.setattr(page, "write_page", lambda *_: pytest.fail("nothing is written before the stage runs"))
    paths = {"TEACHER": str(tiny_teacher.path), "STUDENT": str(linked_student.path)}
    words = [paths.get(word, word) for word in command.split()]
    for more, seed, force in (([], 0, False), (["--seed", "4", "--force", "--set", "bench.per_task=3"], 4, True)):
        assert flashgen(*words, "-o", "x", *more, "--debug").exit_code == 0
        prepared, out, forced = executed.pop()
        assert type(prepared) is runs.stage(stage) and (out, forced, prepared.seed) == (Path("x"), force, seed)
        assert prepared.recipe == load("shapes-demo", ["bench.per_task=3"] if more else [])
        assert {name: getattr(prepared, name) for name in fields} == fields
        assert [str(a.path) for a in prepared.inputs.values()][:1] == [path for word, path in paths.items() if word in command][:1]


def test_quantize_puts_its_options_into_the_recipe(linked_student: Artifact, executed: list[tuple[Stage, Path, bool]]) -> None:
    for options, settings in ((["--budget", "4.25"], {"budget": "4.25"}), (["--scheme", "nf4"], {"scheme": "nf4"})):
        assert flashgen("quantize", linked_student.path, "-o", "x", *options, "--debug").exit_code == 0
        assert executed.pop()[0].recipe.quantize.model_dump(include=set(settings)) == settings
    assert "quantize.budget" in refused(2, "quantize", linked_student.path, "-o", "x", "--budget", "small")


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("teacher random --like tiny", {"like": "tiny", "layers": None, "of_world": None}),
        ("teacher random --like tiny --layers 1 --world shapes --seed 3", {"like": "tiny", "layers": 1, "of_world": "shapes", "seed": 3}),
        ("teacher import hf:owner/name", {"origin": "hf:owner/name", "of_world": None}),
        ("teacher import hf:owner/name --world shapes", {"origin": "hf:owner/name", "of_world": "shapes"}),
    ],
)
def test_teachers_need_no_recipe(command: str, fields: dict[str, Any], executed: list[tuple[Stage, Path, bool]]) -> None:
    assert flashgen(*command.split(), "-o", "x", "--debug").exit_code == 0
    prepared, *_ = executed.pop()
    assert {name: getattr(prepared, name) for name in fields} == fields and not prepared.inputs


def test_random_writes_a_teacher_that_says_its_world(tmp_path: Path) -> None:
    made = made_by("teacher", "random", "--like", "tiny", "--world", "shapes", "-o", tmp_path / "t", "--seed", "3")
    assert (made.manifest.kind, made.manifest.world, made.manifest.seed) == ("teacher", "shapes", 3)
    outside = made_by("teacher", "random", "--like", "tiny", "-o", tmp_path / "t", "--seed", "3")
    assert outside.path.name == "v0002" and outside.manifest.world is None
    assert "--like 'sd9' is not an architecture; choose from shapes, tiny" in refused(2, "teacher", "random", "--like", "sd9", "-o", "x")
    told = refused(3, "teacher", "random", "--like", "tiny", "--world", "letters", "-o", tmp_path / "x")
    assert "world 'letters' is not known here" in told and not (tmp_path / "x").exists()


# plans


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("distill TEACHER", {"embed", "trajectories", "train", "validate"}),
        ("finetune STUDENT", {"embed", "train", "validate"}),
        ("restructure-encoder STUDENT --mode prune", {"embed", "trajectories", "train", "validate"}),
        ("restructure-encoder STUDENT --mode zeros --set bench.per_task=0", {"link"}),
        ("quantize STUDENT --set bench.per_task=0", None),
        ("export STUDENT", None),
        ("export STUDENT --target gguf", None),
    ],
)
def test_plans_of_real_stages_start_nothing(
    command: str, phases: set[str] | None, tiny_teacher: Artifact, linked_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("flashgen.stages.planning"), "CALIBRATION_S", 0.01)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    inputs = {"TEACHER": tiny_teacher, "STUDENT": linked_student}
    words = [str(inputs[word].path) if word in inputs else word for word in command.split()]
    planned = planned_by(*words, "-o", "out")
    assert planned["memory"].keys() == phases if phases is not None else planned["memory"]
    source = inputs["TEACHER" if "TEACHER" in command else "STUDENT"]
    assert planned["inputs"][0]["digest"] == source.manifest.digest and planned["inputs"][0]["bytes"] == source.size_bytes()
    largest = max(planned["memory"].values(), key=lambda parts: sum(parts.values()))
    assert 0 <= planned["memory_bytes"] - sum(largest.values()) <= len(largest)  # each part is rounded down
    assert planned["disk_bytes"] > 0 and planned["seconds"] >= 0 and planned["recipe"]["name"] == "shapes-demo"
    assert sorted(tmp_path.rglob("*")) == before


# outside of the worlds


@pytest.mark.parametrize(
    "command",
    [
        "distill TEACHER",
        "finetune STUDENT",
        "restructure-encoder STUDENT --mode zeros",
        "quantize STUDENT",
        "export STUDENT",
        "bench STUDENT",
    ],
)
def test_an_artifact_of_no_world_has_no_default_recipe(
    command: str, outside_teacher: Artifact, outside_student: Artifact, tmp_path: Path
) -> None:
    paths = {"TEACHER": str(outside_teacher.path), "STUDENT": str(outside_student.path)}
    words = [paths.get(word, word) for word in command.split()]
    told = refused(2, *words, "-o", tmp_path / "x")
    assert "belongs to no world, so it has no default recipe; give one with --recipe NAME|FILE" in told
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "command",
    [
        "distill TEACHER",
        "restructure-encoder STUDENT --mode prune",
        "restructure-encoder STUDENT --mode compact",
        "quantize STUDENT --set quantize.method=gptq",
        "quantize STUDENT --budget 4.5",
    ],
)
def test_stages_that_train_or_calibrate_need_prompts(
    command: str, outside_teacher: Artifact, outside_student: Artifact, tmp_path: Path
) -> None:
    paths = {"TEACHER": str(outside_teacher.path), "STUDENT": str(outside_student.path)}
    words = [paths.get(word, word) for word in command.split()]
    for more in ((), ("--plan",)):
        told = refused(2, *words, *DEMO, "-o", tmp_path / "x", *more)
        assert "needs prompts" in told and "--set prompts_file=FILE" in told and "--recipe NAME|FILE" in told
    assert not (tmp_path / "x").exists()
    (tmp_path / "prompts.txt").write_text("a boat\na dog\n")
    assert planned_by(*words, *DEMO, "--set", f"prompts_file={tmp_path / 'prompts.txt'}", "-o", tmp_path / "x")["out"] == str(
        tmp_path / "x"
    )


def test_what_needs_no_prompts_runs_outside_of_the_worlds(outside_student: Artifact, tmp_path: Path) -> None:
    made = made_by("restructure-encoder", outside_student.path, "--mode", "zeros", *DEMO, "-o", tmp_path / "zeros")
    assert made.manifest.metrics["composition"] == "not judged" and made.manifest.world is None
    assert made.manifest.sampler is not None and made.manifest.sampler.encoder == "zeros"


def test_finetune_with_a_choice_and_no_judge_names_both_ways_out(
    outside_teacher: Artifact, tiny_student: Artifact, linked_student: Artifact, tmp_path: Path
) -> None:
    from flashgen.artifact.draft import Origin, begin

    (tmp_path / "prompts.txt").write_text("a boat\na dog\n")
    prompts = f"prompts_file={tmp_path / 'prompts.txt'}"
    draft = begin(tmp_path / "outside", Origin("student", "distill", "sd3", None, {}, 0, [outside_teacher.as_parent("teacher")]))
    draft.link_tree(tiny_student.path, ".")
    outside = draft.publish(sampler=tiny_student.manifest.sampler)
    for student, more, why in (
        (outside, [], "belongs to no world with a judge"),
        (linked_student, ["--set", "bench.per_task=0"], "bench.per_task=0 draws nothing"),
    ):
        told = refused(2, "finetune", student.path, *DEMO, "--set", prompts, *more, "-o", tmp_path / "x")
        assert "finetune.merge_high=[0.3, 0.5, 0.7] leaves a choice" in told and why in told
        assert "--set finetune.merge_high=[0.7]" in told and "--set bench.per_task=1 or more" in told
    one = ("--set", "finetune.merge_high=[0.7]", "-o", tmp_path / "x")
    assert planned_by("finetune", outside.path, *DEMO, "--set", prompts, *one)["stage"] == "finetune"
    assert not (tmp_path / "x").exists()


# teachers that are no artifacts


@pytest.mark.parametrize("command", [["distill"], ["teacher", "import"], ["quantize"], ["generate", "a dog"], ["bench"], ["show"]])
@pytest.mark.parametrize("path", ["artifacts/techer", "artifacts/techer@v0001"])
def test_a_mistyped_path_is_never_asked_of_the_hub(path: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the path was sent to the hub"))
    monkeypatch.chdir(tmp_path)
    out = [] if command[0] in ("bench", "show") else ["-o", "x.png" if command[0] == "generate" else "out"]
    words = [*command, path] if command == ["teacher", "import"] else [command[0], path, *command[1:]]
    told = refused(3, *words, *out)
    assert "artifacts/techer" in told and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("origin", "code", "message"),
    [
        ("owner/name", 3, "there is no folder owner/name; for a repository on the hub write hf:owner/name"),
        ("hf:name", 2, "name is no hub id; write hf:OWNER/NAME"),
        ("hf:../secret", 2, "is no hub id; write hf:OWNER/NAME"),
        ("hf:owner/name/more", 2, "is no hub id; write hf:OWNER/NAME"),
    ],
)
def test_a_hub_id_is_written_with_its_prefix(origin: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked of the hub"))
    assert message in refused(code, "teacher", "import", origin, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repository_that_cannot_be_had_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class GatedRepoError(Exception):
        pass

    def refuse(error: Exception) -> Any:
        def fetch(*_: Any, **__: Any) -> str:
            raise error

        return fetch

    for error, message in (
        (GatedRepoError(), "owner/name is gated: accept its licence on https://huggingface.co/owner/name, then log in with: hf auth login"),
        (ConnectionError(), "owner/name could not be fetched from the hub (ConnectionError); give a local folder"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(error))
        assert refused(3, "distill", "hf:owner/name", "-o", tmp_path / "out", *DEMO) == message
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def plain(tiny_teacher: Artifact, tmp_path: Path) -> Path:
    """A diffusers folder, as save_pretrained writes it."""
    shutil.copytree(tiny_teacher.path, tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json"))
    return tmp_path / "plain"


def test_an_import_keeps_its_bytes_when_the_folder_is_written_again(plain: Path, tmp_path: Path) -> None:
    made = made_by("teacher", "import", plain, "-o", tmp_path / "out")
    for file in plain.rglob("*.*"):
        with file.open("r+b") as stream:  # in place: the same inode, the same size
            stream.write(b"\0" * file.stat().st_size)
    assert open_artifact(made.path, verify=True).manifest == made.manifest


def test_distill_imports_a_plain_folder_beside_its_own_out(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgen.stages import teacher

    imported: list[Path] = []

    def recorded(kind: Any, refs: Any, out: Path, *rest: Any, **options: Any) -> Artifact:
        imported.append(out)
        return made_by("teacher", "import", options["origin"], "-o", out)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "run", recorded)
    told = refused(2, "distill", plain, "-o", "student")  # an imported teacher is of no world
    assert imported == [tmp_path / "student-teacher"] and "has no default recipe" in told
    refused(2, "distill", plain, "-o", ".")
    assert imported[1:] == [tmp_path.with_name(f"{tmp_path.name}-teacher")]
    assert "no artifact" in refused(3, "distill", "nothing", "-o", "student")
    planned = flashgen("distill", plain, "-o", "other", "--plan", *DEMO)
    assert planned.exit_code == 3 and "flashgen teacher import" in planned.stderr and not (tmp_path / "other-teacher").exists()


# generate and bench


def test_generate_prints_its_pictures(tiny_teacher: Artifact, tmp_path: Path) -> None:
    command = (
        "generate",
        tiny_teacher.path,
        "one",
        "two",
        "-o",
        tmp_path / "a.png",
        "--seed",
        "7",
        "--size",
        "64x32",
        "--steps",
        "1",
        "--guidance",
        "1",
    )
    result = flashgen(*command)
    files = [tmp_path / "a-1.png", tmp_path / "a-2.png"]
    assert result.stdout.splitlines() == [str(file) for file in files], result.stderr
    with Image.open(files[1]) as image:
        assert image.size == (64, 32) and (image.info["prompt"], image.info["seed"]) == ("two", "8")
    record = json.loads(flashgen(*command, "--json").stdout)
    assert (record["images"], record["stage"], record["artifact"]) == ([str(f) for f in files], "generate", str(tiny_teacher.path))
    assert list(record) == ["artifact", "stage", "version", "seconds", "peak_rss_mib", "metrics", "images"]


def test_generate_draws_every_prompt_from_every_seed_and_files_of_prompts(tiny_teacher: Artifact, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("three\n")
    result = flashgen(
        "generate", tiny_teacher.path, "one", "--prompt-file", tmp_path / "more.txt", "--seeds", "4,9", "-o", tmp_path / "a.png",
        "--steps", "1", "--guidance", "1", "--grid", "--preview",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    drawn = [Image.open(path).info for path in result.stdout.splitlines()]
    assert [(info["prompt"], info["seed"]) for info in drawn] == [("one", "4"), ("one", "9"), ("three", "4"), ("three", "9")]
    assert Image.open(tmp_path / "a-grid.png").size == (128, 128) and Image.open(tmp_path / "a-preview.png").info["step"] == "1"


def test_generate_draws_a_picture_again(tiny_teacher: Artifact, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    options = ("--seed", "5", "--steps", "2", "--guidance", "3", "--negative", "a cat", "--size", "96x64")
    assert flashgen("generate", tiny_teacher.path, "a dog", "-o", first, *options).exit_code == 0
    assert flashgen("generate", tiny_teacher.path, "-o", second, "--from-png", first).stdout == f"{second}\n"
    assert first.read_bytes() == second.read_bytes()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "plain.png")
    told = refused(2, "generate", tiny_teacher.path, "-o", second, "--from-png", tmp_path / "plain.png")
    assert "does not say how it was made" in told


def test_generate_refuses_what_the_artifact_cannot_do_before_it_loads_a_network(tmp_path: Path) -> None:
    from tests.artifact.making import publish
    from tests.conftest import tiny_sampler

    publish(tmp_path / "d", sampler=tiny_sampler(sigmas=[1, 0.5, 0], trained_steps=[2]), kind="device")
    for arguments, message in (
        (["a red circle", " "], "prompt is empty"),
        (["a red circle", "--steps", "3"], "--steps 3"),
        (["a red circle", "--size", "65"], "--size 65"),
        (["a red circle", "--device", "cuda"], "--device cuda"),
    ):
        assert message in refused(2, "generate", tmp_path / "d", *arguments, "-o", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def measured_at_once(rows: Any, prompts: list[str], seeds: list[int], how: Any, noise: Any) -> Any:
    """In place of `measure`: 0.1 s for everything and black pictures."""
    for row in rows:
        laps = {"load": [0.1], "encode": [0.1], "step": [0.1] * (len(row.job.sigmas) - 1), "decode": [0.1]}
        about = {"engine": row.job.engine, "device": "cpu", "threads": 1, "peak_rss_mib": 1.0, "peak_phase_mib": {}}
        row.first = about | {"laps": laps}
        row.rounds = [row.first] * how.repeats
    return {row.pictures_key: np.zeros((len(prompts), 64, 64, 3), np.uint8) for row in rows}


def test_bench_prints_its_report_as_json_or_the_folder_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tiny_student: Artifact, tmp_path: Path
) -> None:
    from flashgen.stages import bench

    monkeypatch.setattr(bench, "measure", measured_at_once)
    result = flashgen(
        "bench", tiny_student.path, "--json", "--per-task", "1", "--seed", "5", "--engine", "torch", "--set", "bench.repeats=3"
    )
    report = json.loads(result.stdout)
    (row,) = report["results"]
    assert row["artifact"] == str(tiny_student.path) and row["engine"] == "torch" and "overall" in row["quality"]["composition"]
    assert [prompt["seed"] for prompt in report["prompts"]] == [5 + i for i in range(6)] and row["pictures_measured"] == 3
    assert flashgen("bench", tiny_student.path, "--per-task", "1").stdout == ""
    out = tmp_path / "report"
    result = flashgen("bench", tiny_student.path, "--per-task", "1", "--out", out)
    assert result.stdout == f"{out}\n", result.stderr
    assert {path.name for path in out.iterdir()} >= {"bench.json", "contact-sheet.png", "pictures", "report.html"}


def test_bench_ends_with_4_when_a_row_is_worse_than_the_baseline_and_with_2_for_a_baseline_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, tiny_student: Artifact, tmp_path: Path
) -> None:
    from flashgen.stages import bench

    monkeypatch.setattr(bench, "measure", measured_at_once)
    asked, file = ["bench", str(tiny_student.path), "--per-task", "1"], tmp_path / "a" / "bench.json"
    flashgen(*asked, "--out", tmp_path / "a")
    flashgen(*asked, "--baseline", file)
    report = json.loads(file.read_text())
    faster = tmp_path / "faster.json"
    for name in ("encode", "total_p50"):
        report["results"][0]["latency_s"][name] /= 2
        report["results"][0]["latency_interval_s"][name] = [0.01, 0.02]
    faster.write_text(json.dumps(report))
    result = flashgen(*asked, "--baseline", faster)
    told = result.stderr.splitlines()[-1]
    assert result.exit_code == 4
    assert (
        "encode 50 -> 100 ms, +100%" in told and "total_p50" in told and "decode" not in told and "torch, 1 threads, 64x64, 4 steps" in told
    )
    flashgen(*asked, "--baseline", faster, "--tolerance", "1.01")
    assert "would replace the baseline" in refused(2, *asked, "--baseline", file, "--out", tmp_path / "a")
    assert "other prompts or seeds" in refused(2, *asked, "--seed", "1", "--baseline", file)
    file.write_text(file.read_text()[:-200])
    assert "was cut" in refused(2, *asked, "--baseline", file)


def test_bench_outside_of_the_worlds_needs_prompts_and_judges_nothing(
    monkeypatch: pytest.MonkeyPatch, outside_student: Artifact, tiny_student: Artifact, tmp_path: Path
) -> None:
    from flashgen.stages import bench

    monkeypatch.setattr(bench, "measure", measured_at_once)
    for artifacts in ([outside_student.path], [tiny_student.path, outside_student.path]):
        told = refused(2, "bench", *artifacts, *DEMO)
        assert f"{outside_student.path} belongs to no world" in told and "--set prompts_file=FILE" in told and "--recipe" in told
    (tmp_path / "prompts.txt").write_text("a boat\na dog\n")
    result = flashgen(
        "bench", tiny_student.path, outside_student.path, *DEMO, "--set", f"prompts_file={tmp_path / 'prompts.txt'}", "--json"
    )
    report = json.loads(result.stdout)
    assert [row["quality"] for row in report["results"]] == [{"composition": "not judged"}] * 2
    assert [prompt["prompt"] for prompt in report["prompts"]] == ["a boat", "a dog"]
