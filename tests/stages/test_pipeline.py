"""The chain on a tiny random teacher: what each stage publishes, links, refuses and resumes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import translate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import Artifact, open_artifact, versions
from flashgen.cli.run import plan
from flashgen.errors import ArtifactError, MachineError, NumericsError, UsageError
from flashgen.flow.grid import shifted_grid
from flashgen.models.sample import load_pipeline
from flashgen.quant.pack import QuantizedLinear, dequantize
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.stages import checks, distill, export, finetune, quantize, report, restructure, teacher
from flashgen.training import loop, matching, trajectories
from flashgen.training.matching import Matcher
from flashgen.training.trajectories import Replay, roll_out

MICRO = [
    "distill.trajectory.prompts=16", "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=3", "distill.trajectory.batch=4",
    "distill.matching.iterations=2", "distill.matching.proxy_warmup=0", "distill.matching.prompts=16", "distill.matching.batch=4",
    "finetune.matching.iterations=2", "finetune.matching.proxy_warmup=1", "finetune.matching.prompts=16", "finetune.matching.batch=4",
    "restructure.iterations=2", "restructure.prompts=16", "restructure.batch=4", "bench.per_task=1",
]  # fmt: skip
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def micro(*more: str) -> Recipe:
    return load("shapes-demo", [*MICRO, *more])


class Chain(NamedTuple):
    teacher: Artifact
    student: Artifact
    finetuned: Artifact
    zeros: Artifact
    prune: Artifact
    int4: Artifact


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    out, recipe = tmp_path_factory.mktemp("chain"), micro()
    top = teacher.random("tiny", out / "teacher", 0, False)
    student = distill.run(str(top.path), out / "student", recipe, 0, False)
    tuned = finetune.run(str(student.path), out / "finetuned", recipe, 0, False)
    zeros, prune = (restructure.run(str(tuned.path), out / mode, recipe, 0, False, mode) for mode in ("zeros", "prune"))
    return Chain(top, student, tuned, zeros, prune, quantize.run(str(prune.path), out / "int4", recipe, 0, False))


def digests(artifact: Artifact) -> dict[str, str]:
    """Of every file but the log, which holds wall-clock times."""
    return {f.path: f.sha256 for f in artifact.manifest.files if f.path != "stats.jsonl"}


def linked(a: Artifact, b: Artifact) -> set[str]:
    """Top-level parts of `b` whose every file is the same one on disk in `a`."""
    parts: dict[str, bool] = {}
    for file in b.manifest.files:
        part, other = file.path.split("/")[0], a.path / file.path
        parts[part] = parts.get(part, True) and other.is_file() and other.samefile(b.path / file.path)
    return {part for part, same in parts.items() if same}


def test_every_stage_publishes_a_whole_version_of_its_kind(chain: Chain) -> None:
    facts = {name: (a.manifest.kind, a.manifest.stage, [p.role for p in a.manifest.parents]) for name, a in chain._asdict().items()}
    assert facts == {
        "teacher": ("teacher", "teacher", []),
        "student": ("student", "distill", ["teacher"]),
        "finetuned": ("student", "finetune", ["student", "teacher"]),
        "zeros": ("student", "restructure-encoder", ["student"]),
        "prune": ("student", "restructure-encoder", ["student"]),
        "int4": ("quantized", "quantize", ["student"]),
    }
    for artifact in chain:
        assert open_artifact(artifact.path, verify=True).manifest == artifact.manifest
        assert [v.name for v in versions(artifact.path.parent)] == ["v0001"]
        assert not (artifact.path.parent / ".work").exists()  # nothing is left to resume
    for artifact in chain[1:]:
        assert (artifact.path / "samples" / "validation.png").is_file()
        assert 0 <= artifact.manifest.metrics["composition"]["overall"] <= 1
    assert chain.finetuned.manifest.parents[0].digest == chain.student.manifest.digest


def test_every_stage_states_how_to_sample_it(chain: Chain) -> None:
    samplers = {name: a.manifest.sampler for name, a in chain._asdict().items()}
    for name, sampler in samplers.items():
        assert sampler is not None and sampler.prediction == "velocity" and sampler.shift == 3.0 and sampler.size_px == 64
        if name == "teacher":
            assert sampler.sigmas == shifted_grid(28, 3.0) and sampler.guidance == 4.5 and sampler.trained_steps == []
        else:
            assert sampler.sigmas == shifted_grid(4, 3.0) and sampler.guidance == 1.0 and sampler.trained_steps == [4]
    text = {name: (s.encoder, s.clip_tokens, s.t5_tokens) for name, s in samplers.items() if s}
    assert text["teacher"] == text["student"] == text["finetuned"] == ("full", 16, 16)
    assert text["zeros"] == ("zeros", 16, 16) and text["prune"] == text["int4"] == ("prune", 16, 0)


def test_unchanged_components_are_the_same_files_on_disk(chain: Chain) -> None:
    clips = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    assert linked(chain.teacher, chain.student) == clips | {"text_encoder_3", "tokenizer_3"}
    assert linked(chain.student, chain.finetuned) == clips | {"text_encoder_3", "tokenizer_3"}
    assert linked(chain.finetuned, chain.zeros) == clips | {"transformer"}
    assert linked(chain.finetuned, chain.prune) == clips
    assert linked(chain.prune, chain.int4) == clips
    for artifact in (chain.zeros, chain.prune):
        assert not (artifact.path / "text_encoder_3").exists() and not (artifact.path / "tokenizer_3").exists()
    saved = sum(f.size for f in chain.finetuned.manifest.files if f.path.startswith("text_encoder_3/"))
    assert chain.prune.manifest.metrics["bytes_saved"] == saved > 0
    assert chain.prune.manifest.metrics["text_tokens"] == {"before": 32, "after": 16}


def test_a_compact_encoder_takes_the_place_of_t5(chain: Chain, tmp_path: Path) -> None:
    made = restructure.run(str(chain.finetuned.path), tmp_path / "compact", micro(), 0, False, "compact")
    assert linked(chain.finetuned, made) == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler",
    }  # fmt: skip
    sampler, size = made.manifest.sampler, made.manifest.metrics["encoder_bytes"]
    assert sampler is not None and (sampler.encoder, sampler.t5_tokens) == ("compact", 16)
    assert size["after"] == sum(f.size for f in made.manifest.files if f.path.startswith("text_encoder_3/")) < size["before"]
    device = export.run(str(made.path), tmp_path / "device", micro(), 0, False)
    assert device.manifest.metrics["psnr_db"]["text_encoder_3"] >= 60


def test_a_student_below_the_floor_is_not_published(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = chain.finetuned.manifest.metrics["composition"] | {"overall": 1.0}
    monkeypatch.setitem(chain.finetuned.manifest.metrics, "composition", scored)
    monkeypatch.setattr(restructure, "open_artifact", lambda *_: chain.finetuned)
    with pytest.raises(NumericsError, match=r"below the floor of 1\.000"):
        restructure.run(str(chain.finetuned.path), tmp_path / "zeros", micro("restructure.floor=1"), 0, False, "zeros")
    assert versions(tmp_path / "zeros") == []


def test_every_stage_changes_the_transformer_it_trains(chain: Chain) -> None:
    found = {name: digests(a)[TRANSFORMER] for name, a in chain._asdict().items()}
    assert len({found[name] for name in ("teacher", "student", "finetuned", "prune", "int4")}) == 5
    assert found["zeros"] == found["finetuned"]
    phases = {name: [json.loads(line)["phase"] for line in (chain[i].path / "stats.jsonl").read_text().splitlines()]
              for i, name in ((1, "student"), (2, "finetuned"), (4, "prune"))}  # fmt: skip
    assert phases == {"student": ["trajectory", "matching"], "finetuned": ["high", "low"], "prune": ["recovery"]}


def test_the_same_command_again_returns_the_version_that_is_there(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = micro(), chain.teacher.path.parents[1]
    again = [
        teacher.random("tiny", out / "teacher", 0, False),
        distill.run(str(out / "teacher"), out / "student", recipe, 0, False),
        finetune.run(str(out / "student"), out / "finetuned", recipe, 0, False),
        restructure.run(str(out / "finetuned"), out / "zeros", recipe, 0, False, "zeros"),
        restructure.run(str(out / "finetuned"), out / "prune", recipe, 0, False, "prune"),
        quantize.run(str(out / "prune"), out / "int4", recipe, 0, False),
    ]
    assert [a.path for a in again] == [a.path for a in chain]
    assert capsys.readouterr().err.count("is up to date") == 6


def test_finetune_is_redone_when_the_t5_drop_it_trains_with_changes(chain: Chain, tmp_path: Path) -> None:
    tiny = micro("finetune.matching.iterations=0")
    first = finetune.run(str(chain.student.path), tmp_path, tiny, 0, False)
    changed = micro("finetune.matching.iterations=0", "distill.t5_drop=0.9")
    assert finetune.run(str(chain.student.path), tmp_path, changed, 0, False).path != first.path


@pytest.fixture
def saved_often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matching, "fit", lambda *a, **k: loop.fit(*a, **k, save_every_s=0.0))
    yield


@pytest.mark.usefixtures("saved_often")
def test_a_resumed_distill_equals_an_uninterrupted_one_file_by_file(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, where: str, **options: object) -> float:
        if where == "matching proxy step 1":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.run(str(chain.teacher.path), tmp_path / "out", micro(), 0, False)
    assert versions(tmp_path / "out") == [] and not (tmp_path / "out" / "latest").exists()
    monkeypatch.setattr(matching, "descend", loop.descend)
    resumed = distill.run(str(chain.teacher.path), tmp_path / "out", micro(), 0, False)
    assert "resuming" in capsys.readouterr().err
    assert digests(resumed) == digests(chain.student)
    assert resumed.manifest.metrics == chain.student.manifest.metrics
    rows = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in (a.path / "stats.jsonl").read_text().splitlines()]
            for a in (resumed, chain.student)]  # fmt: skip
    assert rows[0] == rows[1]


def test_another_seed_makes_another_student(chain: Chain, tmp_path: Path) -> None:
    other = distill.run(str(chain.teacher.path), tmp_path / "out", micro("distill.matching.iterations=0"), 1, False)
    same = distill.run(str(chain.teacher.path), tmp_path / "again", micro("distill.matching.iterations=0"), 1, False)
    assert digests(other) == digests(same) and digests(other)[TRANSFORMER] != digests(chain.student)[TRANSFORMER]


def test_wrong_kinds_and_modes_are_refused_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    recipe, out = micro(), tmp_path / "out"
    top, student, int4, zeros = (str(a.path) for a in (chain.teacher, chain.student, chain.int4, chain.zeros))
    wrong: list[tuple[str, Callable[[], Artifact]]] = [
        ("is a student, this needs a teacher", lambda: distill.run(student, out, recipe, 0, False)),
        ("is a teacher, this needs a student", lambda: finetune.run(top, out, recipe, 0, False)),
        ("is a quantized, this needs a student", lambda: finetune.run(int4, out, recipe, 0, False)),
        ("is a teacher, this needs a student", lambda: restructure.run(top, out, recipe, 0, False, "zeros")),
        ("is a quantized, this needs a student", lambda: quantize.run(int4, out, recipe, 0, False)),
        ("names no teacher.*flashgen distill", lambda: finetune.run(zeros, out, recipe, 0, False)),
    ]
    for message, call in wrong:
        with pytest.raises(ArtifactError, match=message):
            call()
    usage: list[tuple[str, Callable[[], Artifact]]] = [
        ("--mode half .*zeros, prune", lambda: restructure.run(student, out, recipe, 0, False, "half")),
        ("is restructured already", lambda: restructure.run(zeros, out, recipe, 0, False, "prune")),
    ]
    for message, call in usage:
        with pytest.raises(UsageError, match=message):
            call()
    unfit = [
        ("no multiple of distill.steps=3", "distill.steps=3"),
        ("multiples of 16 px", "distill.size_px=72"),
        ("blocks are 0 to", "distill.matching.adversarial.blocks=[30]"),
    ]
    for message, setting in unfit:
        with pytest.raises(UsageError, match=message):
            distill.run(top, out, micro(setting), 0, False)
        with pytest.raises(UsageError, match=message):
            plan("distill", {"teacher": top}, out, micro(setting))
    assert not out.exists()


def test_distill_goes_on_from_another_student(chain: Chain, tmp_path: Path) -> None:
    start, nothing = f"distill.start={chain.student.path}", ("distill.trajectory.iterations=0", "distill.matching.iterations=0")
    begun = distill.run(str(chain.teacher.path), tmp_path / "two", micro(start, "distill.steps=2", *nothing), 0, False)
    assert begun.manifest.sampler is not None and begun.manifest.sampler.sigmas == shifted_grid(2, 3.0)
    assert {p.role: p.digest for p in begun.manifest.parents}["start"] == chain.student.manifest.digest
    planned = plan("distill", {"teacher": str(chain.teacher.path)}, tmp_path / "two", micro(start, "distill.steps=2", *nothing))
    assert {i["role"]: i["digest"] for i in planned["inputs"]} == {p.role: p.digest for p in begun.manifest.parents}
    student, teacher_, now = (load_file(a.path / TRANSFORMER) for a in (chain.student, chain.teacher, begun))
    assert all(torch.equal(now[name], student[name]) for name in student)
    assert not all(torch.equal(now[name], teacher_[name]) for name in student)
    with pytest.raises(UsageError, match="not of the teacher's shape"):
        distill.run("shapes", tmp_path / "other", micro(start), 0, False)
    with pytest.raises(UsageError, match="adapters of the teacher's own weights"):
        micro(start, "distill.lora.rank=2")


def test_distill_follows_another_student(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Replay] = {}
    monkeypatch.setattr(trajectories, "train_on_trajectories", lambda net, replay, *rest, **more: seen.setdefault("replay", replay))
    start, few = f"distill.start={chain.student.path}", ("distill.steps=2", "distill.strides=[1, 3]", "distill.matching.iterations=0")
    recipe = micro(start, "distill.follow=start", *few)
    made = distill.run(str(chain.teacher.path), tmp_path / "two", recipe, 0, False)
    before = chain.student.manifest.sampler
    assert before is not None and made.manifest.sampler is not None
    assert made.manifest.sampler.sigmas == [1.0, before.sigmas[1], 0.0]
    replay, net = seen["replay"], load_pipeline(chain.student.path).transformer
    with torch.no_grad():
        states = roll_out(lambda _: net, replay.starts[:, 0].float(), replay.pool[slice(None)], before.sigmas).states
    assert torch.allclose(replay.ends[:, 1].float(), states[-1], atol=0.02, rtol=1e-2)


def test_distill_refuses_a_student_that_it_cannot_follow(chain: Chain, tmp_path: Path) -> None:
    start = f"distill.start={chain.student.path}"
    refused = {
        "say whose with --set distill.start=STUDENT": [],
        "to be followed in 4 it must have more": [start],
        "strides must be 3 numbers whose sum is that": [start, "distill.steps=3"],
        "whose sum is that, not [1, 1]": [start, "distill.steps=2", "distill.strides=[1, 1]"],
        "its own size with --set distill.size_px=64": [start, "distill.steps=2", "distill.size_px=32"],
        "with another text encoder (prune)": [f"distill.start={chain.prune.path}", "distill.steps=2"],
    }
    for message, settings in refused.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            distill.run(str(chain.teacher.path), tmp_path / "no", micro("distill.follow=start", *settings), 0, False)
    assert not (tmp_path / "no").exists()


def test_finetune_refuses_a_teacher_that_is_not_the_students(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher.path, tmp_path / "teacher")
    student = distill.run(str(tmp_path / "teacher"), tmp_path / "student", micro("distill.matching.iterations=0"), 0, False)
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ArtifactError, match="teacher"):
        finetune.run(str(student.path), tmp_path / "out", micro(), 0, False)
    other = teacher.random("tiny", tmp_path / "other", 9, False)
    shutil.copytree(other.path, tmp_path / "teacher")
    with pytest.raises(ArtifactError, match=r"is not the one .* was made from"):
        finetune.run(str(student.path), tmp_path / "out", micro(), 0, False)


def test_finetune_with_adapters_publishes_a_dense_student_and_resumes(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("finetune.lora.rank=2", "finetune.merge_high=[0.3]", "finetune.matching.lr=1e-2", "finetune.allow_worse=1")
    tuned = finetune.run(str(chain.student.path), tmp_path, recipe, 0, False)
    before, after = (load_file(a.path / TRANSFORMER) for a in (chain.student, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(re.search(r"to_|add_|net", name) for name in changed)
    assert finetune.run(str(chain.student.path), tmp_path, recipe, 0, False).path == tuned.path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("finetune.matching.node_matching=[1.0, 1.0]", "one for each of the 4"),
        ("finetune.matching.proxy_coupling=0.9", "adapters of different networks"),
        ("finetune.lora.base=bfloat16", "leave finetune.lora.base out"),
    ],
)
def test_finetune_refuses_impossible_recipes_before_any_work(change: str, told: str, chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        finetune.run(str(chain.student.path), tmp_path, micro(change, "finetune.lora.rank=2"), 0, False)
    with pytest.raises(UsageError, match=told):
        plan("finetune", {"student": str(chain.student.path)}, tmp_path, micro(change, "finetune.lora.rank=2"))
    assert not any(tmp_path.iterdir())


def test_finetune_of_two_steps_leaves_the_low_branch_alone(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.steps=2", "distill.matching.iterations=0", "finetune.merge_high=[0.0]")
    student = distill.run(str(chain.teacher.path), tmp_path / "student", recipe, 0, False)
    tuned = finetune.run(str(student.path), tmp_path / "tuned", recipe, 0, False)
    before, after = load_file(student.path / TRANSFORMER), load_file(tuned.path / TRANSFORMER)
    assert all(torch.equal(before[name], after[name]) for name in before)  # all low: nothing was trained
    high = finetune.run(str(student.path), tmp_path / "tuned", micro("distill.steps=2", "finetune.merge_high=[1.0]"), 0, False)
    assert digests(high)[TRANSFORMER] != digests(student)[TRANSFORMER]


def judged(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """The judge's next answers on 100 choice prompts: the input first, then each merge."""
    answers = iter(shares)
    monkeypatch.setattr(report, "verdicts", lambda *arguments: np.arange(100) < 100 * next(answers))


def test_finetune_publishes_the_merge_that_does_best_on_the_choice_prompts(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, 0.5, 0.4, 0.6, 0.6)
    tuned = finetune.run(str(chain.student.path), tmp_path / "out", micro("finetune.merge_high=[0.0, 1.0, 0.5]"), 0, False)
    assert tuned.manifest.metrics["choice"] == {"input": 0.5, "merge 0": 0.4, "merge 1": 0.6, "merge 0.5": 0.6}
    assert tuned.manifest.metrics["merge_high"] == 1.0
    judged(monkeypatch, 0.5, 0.5)
    alone = finetune.run(str(chain.student.path), tmp_path / "high", micro("finetune.merge_high=[1.0]", "finetune.allow_worse=1"), 0, False)
    assert digests(alone)[TRANSFORMER] == digests(tuned)[TRANSFORMER]


def test_finetune_publishes_nothing_below_its_input_unless_told(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, out = "finetune.merge_high=[0.5]", tmp_path / "out"
    judged(monkeypatch, 0.5, 0.49)
    with pytest.raises(NumericsError, match=r"0\.500 -> 0\.490 .*allow_worse=0 below.*allow_worse=1 publishes"):
        finetune.run(str(chain.student.path), out, micro(merge, "finetune.allow_worse=0"), 0, False)
    assert versions(out) == []
    monkeypatch.setattr(Matcher, "update", lambda *_: pytest.fail("the branches are trained already"))
    judged(monkeypatch, 0.5, 0.3)
    with pytest.raises(NumericsError, match=r"allow_worse=0\.1 below"):
        finetune.run(str(chain.student.path), out, micro(merge, "finetune.allow_worse=0.1"), 0, False)
    judged(monkeypatch, 0.5, 0.49)
    told = micro(merge, "finetune.allow_worse=0.1")
    assert finetune.run(str(chain.student.path), out, told, 0, False).manifest.metrics["choice"]["merge 0.5"] == 0.49


def test_no_iterations_leave_stages_of_distill_out(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.trajectory.iterations=0", "distill.matching.iterations=0", "distill.matching.node_trajectory=[1.0]")
    same = distill.run(str(chain.teacher.path), tmp_path, recipe, 0, False)
    before, after = (load_file(a.path / TRANSFORMER) for a in (chain.teacher, same))
    assert all(torch.equal(before[name].half(), after[name].half()) for name in before)
    assert not (same.path / "stats.jsonl").exists()


def test_the_control_spends_the_updates_of_both_branches_on_one_network(chain: Chain, tmp_path: Path) -> None:
    plain = finetune.run(str(chain.student.path), tmp_path, micro("finetune.control=true", "finetune.allow_worse=1"), 0, False)
    rows = [json.loads(line) for line in (plain.path / "stats.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [("control", 5)]  # 1 for the proxy alone, 2 x 2 updates


def test_branches_are_looked_at_merged(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.5, 0.4, 0.6, 0.7, 0.4, 0.5)  # the input, two looks at either branch, the merge
    seen: list[dict[str, torch.Tensor]] = []
    merge = finetune.merge

    def recorded(target: torch.nn.Module, high: torch.nn.Module, low: torch.nn.Module, weight_high: float) -> None:
        merge(target, high, low, weight_high)
        seen.append({name: value.clone() for name, value in target.state_dict().items()})

    monkeypatch.setattr(finetune, "merge", recorded)
    recipe = micro("finetune.matching.watch_every=1", "finetune.merge_high=[0.5]", "finetune.matching.lr=1e-3")
    tuned = finetune.run(str(chain.student.path), tmp_path / "out", recipe, 0, False)
    rows = [json.loads(line) for line in (tuned.path / "stats.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["composition"]) for row in rows] == [("high", 0.5), ("low", pytest.approx(0.55))]  # means
    assert all(torch.equal(seen[2][name], value) for name, value in seen[4].items())  # both ended where they looked best
    assert not torch.equal(seen[1]["proj_out.weight"], seen[0]["proj_out.weight"])


def test_distill_keeps_the_best_look_and_shows_each(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.2, 0.6, 0.4)
    recipe = micro("distill.matching.iterations=3", "distill.matching.watch_every=1")
    student = distill.run(str(chain.teacher.path), tmp_path / "out", recipe, 0, False)
    assert student.manifest.metrics["watched"] == {"best": 0.6, "best_step": 2, "last": 0.4}
    two, three = (
        distill.run(str(chain.teacher.path), tmp_path / f"{n}", micro(f"distill.matching.iterations={n}"), 0, False) for n in (2, 3)
    )
    assert digests(student)[TRANSFORMER] == digests(two)[TRANSFORMER]
    best, last = load_file(student.path / TRANSFORMER), load_file(student.path / "last" / "diffusion_pytorch_model.safetensors")
    assert best.keys() == last.keys() and all(torch.equal(last[key], value) for key, value in load_file(three.path / TRANSFORMER).items())
    assert not (three.path / "last").exists()
    others = (f for f in student.path.rglob("*") if f.is_file() and f.parent.name != "last" and f.name != "manifest.json")
    assert student.size_bytes() == sum(f.stat().st_size for f in others)


def test_a_look_leaves_a_grid(chain: Chain, tmp_path: Path) -> None:
    student = distill.run(str(chain.teacher.path), tmp_path, micro("distill.matching.watch_every=1"), 0, False)
    assert {f.path for f in student.manifest.files} >= {"samples/matching-000001.png", "samples/matching-000002.png"}


def test_regression_can_be_looked_at_without_a_judge_and_ends_the_same(chain: Chain, tmp_path: Path) -> None:
    own = tmp_path / "prompts.txt"
    own.write_text("".join(f"prompt {i}\n" for i in range(9)))
    recipe = micro("distill.trajectory.watch_every=1", "distill.matching.watch_every=1", "bench.per_task=0", f"prompts_file={own}")
    student = distill.run(str(chain.teacher.path), tmp_path / "out", recipe, 0, False)
    looks = [f.path for f in student.manifest.files if f.path.startswith("samples/")]
    assert looks == [*(f"samples/matching-00000{i}.png" for i in (1, 2)), *(f"samples/trajectory-00000{i}.png" for i in (1, 2, 3))]
    size = student.manifest.sampler.size_px if student.manifest.sampler else 0
    assert Image.open(student.path / looks[0]).size == (8 * size, size)
    assert "watched" not in student.manifest.metrics and "composition" not in student.manifest.metrics
    unseen = distill.run(str(chain.teacher.path), tmp_path / "unseen", micro("bench.per_task=0", f"prompts_file={own}"), 0, False)
    assert digests(student)[TRANSFORMER] == digests(unseen)[TRANSFORMER]
    looked = micro("bench.per_task=0", f"prompts_file={own}", "distill.trajectory.watch_every=1")
    assert distill.run(str(chain.teacher.path), tmp_path / "unseen", looked, 0, False).path == unseen.path  # up to date


def test_corrections_change_the_student_and_a_sharded_run_refuses_them(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro("distill.correction.iterations=2", "distill.correction.batch=4", "distill.correction.prompts=8")
    student = distill.run(str(chain.teacher.path), tmp_path, recipe, 0, False)
    assert digests(student)[TRANSFORMER] != digests(chain.student)[TRANSFORMER]
    phases = [json.loads(line)["phase"] for line in (student.path / "stats.jsonl").read_text().splitlines()]
    assert phases == ["trajectory", "correction", "matching"]
    with pytest.raises(UsageError, match=r"correction\.prompts=17 are the first of trajectory\.prompts=16"):
        micro("distill.correction.iterations=2", "distill.correction.prompts=17")
    monkeypatch.setattr(checks, "sharded", lambda: True)
    with pytest.raises(UsageError, match=r"distill\.correction\.iterations=0"):
        distill.run(str(chain.teacher.path), tmp_path, recipe, 0, False)


def test_strides_say_which_of_the_teachers_steps_the_student_takes(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.trajectory.teacher_steps=6", "distill.strides=[2, 1, 1, 2]")
    student = distill.run(str(chain.teacher.path), tmp_path, recipe, 0, False)
    fine = shifted_grid(6, 3.0)
    assert student.manifest.sampler is not None and student.manifest.sampler.sigmas == [fine[at] for at in (0, 2, 3, 4, 6)]
    assert distill.student_grid(micro("distill.trajectory.teacher_steps=12").distill, shifted_grid(12, 3.0)) == shifted_grid(4, 3.0)
    for wrong in ("[2, 2, 2]", "[2, 1, 1, 1]"):
        with pytest.raises(UsageError, match=r"strides must be 4 numbers whose sum is trajectory\.teacher_steps=6"):
            micro("distill.trajectory.teacher_steps=6", f"distill.strides={wrong}")


def test_finetune_follows_the_teacher_through_its_students_own_sigmas(chain: Chain, tmp_path: Path) -> None:
    adversarial = ["finetune.matching.node_adversarial=[0, 0, 0, 1]", "distill.trajectory.teacher_steps=6"]
    with pytest.raises(UsageError, match=r"teacher_steps=6 skips the student's sigma 0\.9, 0\.5; --set"):
        finetune.run(str(chain.student.path), tmp_path / "out", micro(*adversarial), 0, False)
    assert not (tmp_path / "out").exists()


def test_teacher_and_student_are_compiled_for_trajectories_and_corrections(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[torch.nn.Module]
) -> None:
    monkeypatch.setattr(distill, "check_compiler", lambda _: None)
    more = ["distill.correction.iterations=1", "distill.correction.batch=4", "distill.correction.prompts=8"]
    student = distill.run(str(chain.teacher.path), tmp_path, micro("distill.compile=true", *more), 0, False)
    top, learner = traced[:2]
    assert [id(net) for net in traced] == [id(top), id(learner)] * 2 and top is not learner
    assert load_pipeline(student.path).transformer.state_dict().keys() == top.state_dict().keys()


def test_compiling_wants_a_compiler_and_networks_of_their_own(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro("distill.compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"there is no 'no-such-compiler'; .* --set distill\.compile=false"):
        distill.run(str(chain.teacher.path), tmp_path / "out", recipe, 0, False)
    with pytest.raises(MachineError, match=r"--set distill\.compile=false"):
        finetune.run(
            str(chain.student.path), tmp_path / "out", micro("distill.compile=true", "finetune.matching.node_trajectory=[1]"), 0, False
        )
    with pytest.raises(MachineError, match=r"--set teacher\.flow\.compile=false"):
        teacher.train(micro("teacher.flow.compile=true"), tmp_path / "teacher", 0, False)
    with pytest.raises(UsageError, match="compile=true does not go with lora"):
        micro("distill.compile=true", "distill.lora.rank=4")
    monkeypatch.setattr(checks, "sharded", lambda: True)
    with pytest.raises(UsageError, match=r"distill\.compile=false"):
        distill.run(str(chain.teacher.path), tmp_path / "out", recipe, 0, False)


def test_the_adversarys_real_pictures_are_cached_for_finetune_too(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("finetune.matching.node_adversarial=[0, 0, 0, 1]", "finetune.allow_worse=1")
    tuned = finetune.run(str(chain.student.path), tmp_path, recipe, 0, False)
    rows = {row["phase"]: row for row in map(json.loads, (tuned.path / "stats.jsonl").read_text().splitlines())}
    assert "logit_real" in rows["low"] and "logit_real" not in rows["high"]


def test_quantized_folder_holds_the_codes_of_its_own_weights(chain: Chain) -> None:
    layers = json.loads((chain.int4.path / "quantized" / "layers.json").read_text())
    tensors = load_file(chain.int4.path / "quantized" / "transformer.safetensors")
    state = load_file(chain.int4.path / TRANSFORMER)
    before = load_pipeline(chain.prune.path).transformer
    linears = {name for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(layers) == linears and any(".norm1.linear" in name for name in linears)  # adaLN too
    for name, layer in layers.items():
        protected = name.startswith(("proj_out", "pos_embed", "norm_out", "context_embedder", "time_text_embed"))
        assert layer == {"bits": 8 if protected else 4, "group": 32, "symmetric": False}
        k = before.get_submodule(name).in_features
        codes, scales, zeros = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
        q = QuantizedLinear(codes, scales.float(), zeros, layer["bits"], 32, k)
        assert torch.equal(state[f"{name}.weight"], dequantize(q).half())
    packed = sum(t.nbytes for t in tensors.values())
    assert chain.int4.manifest.metrics["packed_bytes"] == packed
    assert 0 < chain.int4.manifest.metrics["weight_error_max"] < 0.2
    untouched = {name for name in state if name.endswith(".bias")}
    source = load_file(chain.prune.path / TRANSFORMER)
    assert untouched and all(torch.equal(state[name], source[name]) for name in untouched)


def test_quantize_refuses_weights_that_are_not_finite(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.prune.path, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / TRANSFORMER)
    weights["transformer_blocks.0.attn.to_q.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / TRANSFORMER, metadata={"format": "pt"})  # the same size: only --verify would see it
    with pytest.raises(NumericsError, match="finite"):
        quantize.run(str(tmp_path / "broken"), tmp_path / "out", micro(), 0, False)
    assert versions(tmp_path / "out") == []


def test_distill_stops_before_a_step_when_the_teacher_is_not_finite(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher.path, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / TRANSFORMER)
    weights["proj_out.bias"][0] = float("inf")
    save_file(weights, tmp_path / "broken" / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"trajectory step 0.*before the optimizer step"):
        distill.run(str(tmp_path / "broken"), tmp_path / "out", micro(), 0, False)
    assert versions(tmp_path / "out") == []


def test_import_takes_a_plain_diffusers_folder(chain: Chain, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    load_pipeline(chain.teacher.path).save_pretrained(folder)
    (folder / "README.md").write_text("not part of a pipeline")
    (folder / "text_encoders").mkdir()  # ComfyUI's, in SD3.5's repositories
    shutil.copyfile(folder / TRANSFORMER, folder / "text_encoders" / "t5xxl_fp16.safetensors")
    index = json.loads((folder / "model_index.json").read_text())  # an IP-Adapter's, which flashgen has no use for
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": ["transformers", "SiglipVisionModel"]}))
    first = teacher.import_(str(folder), tmp_path / "out", False)
    assert open_artifact(first.path, ("teacher",), verify=True).manifest.sampler == chain.teacher.manifest.sampler
    assert (first.path / TRANSFORMER).samefile(folder / TRANSFORMER) and not (first.path / "README.md").exists()
    assert not (first.path / "text_encoders").exists()
    a, b = (load_pipeline(path).transformer.state_dict() for path in (chain.teacher.path, first.path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert teacher.import_(str(folder), tmp_path / "out", False).path == first.path

    weights = load_file(folder / TRANSFORMER)
    weights["proj_out.bias"] += 1
    (folder / TRANSFORMER).unlink()
    save_file(weights, folder / TRANSFORMER, metadata={"format": "pt"})  # other weights, the same size
    assert teacher.import_(str(folder), tmp_path / "out", False).path.name == "v0002"
    assert open_artifact(first.path, verify=True).path == first.path


def test_a_hub_id_brings_the_pipeline_alone(monkeypatch: pytest.MonkeyPatch, chain: Chain) -> None:
    import huggingface_hub

    there = [
        "README.md", "model_index.json", "sd3.5_medium.safetensors", "mmdit-x.py", "text_encoders/clip_g.safetensors",
        "text_encoders/t5xxl_fp16.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors", "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors.index.fp16.json", "tokenizer/merges.txt",
        "tokenizer_3/spiece.model", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json",
    ]  # fmt: skip
    asked: list[str] = []

    def fetch(source: str, **patterns: Any) -> str:
        wanted, unwanted = ([re.compile(translate(p)) for p in patterns[kind]] for kind in ("allow_patterns", "ignore_patterns"))
        asked.extend(name for name in there if any(p.match(name) for p in wanted) and not any(p.match(name) for p in unwanted))
        return str(chain.teacher.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    teacher._download("stabilityai/stable-diffusion-3.5-medium")
    assert asked == ["model_index.json", *(name for name in there[6:] if "fp16" not in name)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "FluxPipeline"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae has no safetensors"),
    ],
    ids=["no index", "another pipeline", "no weights"],
)
def test_import_refuses_other_folders(spoil, message: str, chain: Chain, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(chain.teacher.path, tmp_path / "plain")
    spoil(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=message):
        teacher.import_(str(tmp_path / "plain"), tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_train_makes_a_teacher_that_can_be_distilled(tmp_path: Path) -> None:
    recipe = load(
        "shapes-demo",
        [
            *MICRO, "teacher.autoencoder.steps=2", "teacher.autoencoder.batch=4", "teacher.encoders.steps=2", "teacher.encoders.batch=4",
            "teacher.flow.steps=2", "teacher.flow.batch=4", "teacher.flow.samples=64", "teacher.flow.compile=false",
        ],
    )  # fmt: skip
    made = teacher.train(recipe, tmp_path / "teacher", 0, False)
    assert open_artifact(made.path, ("teacher",), verify=True).manifest.sampler == made.manifest.sampler
    pipe = load_pipeline(made.path)
    assert pipe.vae.config.scaling_factor != 1.0 and pipe.vae.config.shift_factor != 0.0  # set from the data
    phases = {json.loads(line)["phase"] for line in (made.path / "stats.jsonl").read_text().splitlines()}
    assert phases == {"autoencoder", "encoders", "teacher"}
    assert teacher.train(recipe, tmp_path / "teacher", 0, False).path == made.path
    again = teacher.train(recipe, tmp_path / "again", 0, False)
    assert digests(again) == digests(made)  # the same command makes the same teacher, tokenizers included


def test_prompts_of_ones_own(chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a lighthouse\n\nan old boat\n")
    recipe = micro().model_copy(update={"prompts_file": file})
    runs = [restructure.run(str(chain.student.path), tmp_path / "slim", recipe, 0, False, "prune").manifest.version for _ in range(2)]
    file.write_text("a lighthouse\n")
    runs.append(restructure.run(str(chain.student.path), tmp_path / "slim", recipe, 0, False, "prune").manifest.version)
    assert runs == ["v0001", "v0001", "v0002"]  # other prompts, another student
    file.write_text("\n")
    with pytest.raises(UsageError, match=r"prompts_file=.* has no prompts"):
        distill.run(str(chain.teacher.path), tmp_path / "student", recipe, 0, False)
