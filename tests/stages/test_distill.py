"""distill: resumed, continued, followed, validated, compiled; and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import versions
from flashgen.errors import MachineError, NumericsError, UsageError
from flashgen.families.conditioning import Conditioning
from flashgen.flow.grid import shifted_grid
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.runtime.machines import Machine
from flashgen.stages import distill, finetune, trainings, trajectories
from flashgen.stages.base import prepare
from flashgen.training import cache as caching
from flashgen.training import loop, matching, prompts, regression
from flashgen.training.cache import Replay
from flashgen.training.checkpoint import Checkpoint
from flashgen.training.mapped import read_mark
from flashgen.training.rollout import roll_out
from tests import runs
from tests.stages.chain import TRANSFORMER, Chain, digests, judged, micro
from tests.stages.test_damaged import reseal


@pytest.fixture
def saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)


@pytest.mark.usefixtures("saved_at_every_step")
def test_a_resumed_distill_equals_an_uninterrupted_one_file_by_file(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, where: str, **options: object) -> tuple[Tensor, Tensor]:
        if where == "matching fake score step 1":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.distill(str(chain.teacher.path), tmp_path / "out", micro())
    assert versions(tmp_path / "out") == [] and not (tmp_path / "out" / "latest").exists()
    monkeypatch.setattr(matching, "descend", loop.descend)
    resumed = runs.distill(str(chain.teacher.path), tmp_path / "out", micro())
    assert "resuming" in capsys.readouterr().err
    assert digests(resumed) == digests(chain.student)
    assert resumed.manifest.metrics == chain.student.manifest.metrics
    logs = [(artifact.path / "stats.jsonl").read_text().splitlines() for artifact in (resumed, chain.student)]
    rows = [[{k: v for k, v in json.loads(line).items() if k not in ("time", "machine")} for line in log] for log in logs]
    assert rows[0] == rows[1]


def test_another_learning_rate_embeds_no_prompt_and_computes_no_trajectory_again(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded, passes = list[int](), list[str]()
    encode, ends = encode_prompts, caching.TrajectorySource.ends

    def counted(pipe: Pipeline, texts: list[str], sampler: Sampler) -> Conditioning:
        encoded.append(len(texts))
        return encode(pipe, texts, sampler)

    def watched(self: caching.TrajectorySource, *arguments: Any) -> list[torch.Tensor]:
        passes.append("ends")
        return ends(self, *arguments)

    monkeypatch.setattr(prompts, "encode_prompts", counted)
    monkeypatch.setattr(caching.TrajectorySource, "ends", watched)
    made = runs.distill(str(chain.teacher.path), tmp_path / "out", micro())
    assert sum(encoded) <= 1 + 33 and passes == ["ends"]
    encoded.clear()
    passes.clear()
    capsys.readouterr()
    for setting in ("distill.matching.lr=1e-5", "distill.trajectory.lr=1e-5", "distill.matching.batch=2"):
        other = runs.distill(str(chain.teacher.path), tmp_path / "out", micro(setting))
        assert encoded == [] and passes == [] and digests(other)[TRANSFORMER] != digests(made)[TRANSFORMER]
    said = capsys.readouterr().err
    assert "embeddings are reused from" in said and "parts are reused from" in said
    again = runs.distill(str(chain.teacher.path), tmp_path / "out", micro(), 0, True)
    assert digests(again) == digests(made) and passes == []
    for number, setting in enumerate(
        ("distill.trajectory.guidance=2.5", "distill.encoder_drop=0.5", "distill.trajectory.teacher_steps=8"), 1
    ):
        runs.distill(str(chain.teacher.path), tmp_path / "out", micro(setting))
        assert encoded == [] and len(passes) == number, setting


def test_stages_share_a_cache_that_the_environment_names(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    student = runs.distill(str(chain.teacher.path), tmp_path / "student", micro())
    assert digests(student) == digests(chain.student) and not (tmp_path / "student" / ".work").exists()
    (states,) = (tmp_path / "cache").glob("trajectories-*/states.bin")
    monkeypatch.setattr(caching.TrajectorySource, "ends", lambda *_: pytest.fail("these trajectories are known"))
    runs.finetune(str(student.path), tmp_path / "finetuned", micro("finetune.matching.node_trajectory=[0.1]"))
    assert [*(tmp_path / "cache").glob("trajectories-*/states.bin")] == [states]
    assert len([*(tmp_path / "cache").glob("prompts-*")]) == 1


def test_embeddings_beyond_the_budget_are_not_stored(chain: Chain, tmp_path: Path) -> None:
    few = micro("distill.matching.prompts=8", "prompts.cache_gib=0.00004")  # of 4,224 bytes each: eight fit, sixteen do not
    made = runs.distill(str(chain.teacher.path), tmp_path / "out", few)
    stored = runs.distill(str(chain.teacher.path), tmp_path / "stored", micro("distill.matching.prompts=8"))
    a, b = (load_file(artifact.path / TRANSFORMER) for artifact in (made, stored))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    marks = map(read_mark, (tmp_path / "out/.work/cache").glob("prompts-*/[0-9]*.done"))
    embedded = {digest for mark in marks if mark for digest in mark[1]}
    assert 1 < len(embedded) <= 9
    plans = [
        runs.plan("distill", {"teacher": str(chain.teacher.path)}, tmp_path / "x", recipe)
        for recipe in (few, micro("distill.matching.prompts=8"))
    ]
    assert plans[1]["disk_bytes"] - plans[0]["disk_bytes"] == 16 * 4224
    assert plans[0]["memory"]["train"].keys() - plans[1]["memory"]["train"].keys() == {"text_encoder", "text_encoder_2", "text_encoder_3"}


def test_another_seed_makes_another_student(chain: Chain, tmp_path: Path) -> None:
    other = runs.distill(str(chain.teacher.path), tmp_path / "out", micro("distill.matching.iterations=0"), 1, False)
    same = runs.distill(str(chain.teacher.path), tmp_path / "again", micro("distill.matching.iterations=0"), 1, False)
    assert digests(other) == digests(same) and digests(other)[TRANSFORMER] != digests(chain.student)[TRANSFORMER]


def test_distill_goes_on_from_another_student(chain: Chain, tmp_path: Path) -> None:
    start, nothing = f"distill.start={chain.student.path}", ("distill.trajectory.iterations=0", "distill.matching.iterations=0")
    made = runs.distill(str(chain.teacher.path), tmp_path / "two", micro(start, "distill.steps=2", *nothing))
    assert made.manifest.sampler is not None and made.manifest.sampler.sigmas == shifted_grid(2, 3.0)
    assert {p.role: p.digest for p in made.manifest.parents}["start"] == chain.student.manifest.digest
    planned = runs.plan("distill", {"teacher": str(chain.teacher.path)}, tmp_path / "two", micro(start, "distill.steps=2", *nothing))
    assert {i["role"]: i["digest"] for i in planned["inputs"]} == {p.role: p.digest for p in made.manifest.parents}
    student, teacher_, now = (load_file(a.path / TRANSFORMER) for a in (chain.student, chain.teacher, made))
    assert all(torch.equal(now[name], student[name]) for name in student)
    assert not all(torch.equal(now[name], teacher_[name]) for name in student)
    with pytest.raises(UsageError, match="not of the teacher's shape"):
        runs.distill("shapes", tmp_path / "other", micro(start))
    with pytest.raises(UsageError, match="adapters of the teacher's own weights"):
        micro(start, "distill.lora.rank=2")


def test_distill_follows_another_student(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Replay] = {}
    monkeypatch.setattr(regression, "regress", lambda net, replay, *rest, **more: seen.setdefault("replay", replay))
    start, few = f"distill.start={chain.student.path}", ("distill.steps=2", "distill.strides=[1, 3]", "distill.matching.iterations=0")
    recipe = micro(start, "distill.follow=start", *few)
    made = runs.distill(str(chain.teacher.path), tmp_path / "two", recipe)
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
        "name the student with --set distill.start=STUDENT": [],
        "to be followed in 4 it must have more": [start],
        "strides must be 3 numbers whose sum is that": [start, "distill.steps=3"],
        "whose sum is that, not [1, 1]": [start, "distill.steps=2", "distill.strides=[1, 1]"],
        "its own size with --set distill.size_px=64": [start, "distill.steps=2", "distill.size_px=32"],
        "with other text encoders (prune)": [f"distill.start={chain.prune.path}", "distill.steps=2"],
    }
    for message, settings in refused.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            runs.distill(str(chain.teacher.path), tmp_path / "no", micro("distill.follow=start", *settings))
    assert not (tmp_path / "no").exists()


def test_no_iterations_leave_stages_of_distill_out(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.trajectory.iterations=0", "distill.matching.iterations=0", "distill.matching.node_trajectory=[1.0]")
    same = runs.distill(str(chain.teacher.path), tmp_path, recipe)
    before, after = (load_file(a.path / TRANSFORMER) for a in (chain.teacher, same))
    assert all(torch.equal(before[name].half(), after[name].half()) for name in before)
    assert not (same.path / "stats.jsonl").exists()


def test_distill_keeps_the_best_validation_and_shows_each(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.2, 0.6, 0.4)
    recipe = micro("distill.matching.iterations=3", "distill.matching.validate_every=1")
    student = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe)
    assert student.manifest.metrics["validated"] == {"best": 0.6, "best_step": 2, "last": 0.4}
    two, three = (runs.distill(str(chain.teacher.path), tmp_path / f"{n}", micro(f"distill.matching.iterations={n}")) for n in (2, 3))
    assert digests(student)[TRANSFORMER] == digests(two)[TRANSFORMER]
    best, last = load_file(student.path / TRANSFORMER), load_file(student.path / "last" / "diffusion_pytorch_model.safetensors")
    assert best.keys() == last.keys() and all(torch.equal(last[key], value) for key, value in load_file(three.path / TRANSFORMER).items())
    assert not (three.path / "last").exists()
    others = (f for f in student.path.rglob("*") if f.is_file() and f.parent.name != "last" and f.name != "manifest.json")
    assert student.size_bytes() == sum(f.stat().st_size for f in others)


def test_a_validation_leaves_a_grid(chain: Chain, tmp_path: Path) -> None:
    student = runs.distill(str(chain.teacher.path), tmp_path, micro("distill.matching.validate_every=1"))
    assert {f.path for f in student.manifest.files} >= {"samples/matching-000001.png", "samples/matching-000002.png"}


def test_regression_is_validated_without_a_judge_and_ends_the_same(chain: Chain, tmp_path: Path) -> None:
    own = tmp_path / "prompts.txt"
    own.write_text("".join(f"prompt {i}\n" for i in range(9)))
    recipe = micro("distill.trajectory.validate_every=1", "distill.matching.validate_every=1", "bench.per_task=0", f"prompts_file={own}")
    student = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe)
    grids = [f.path for f in student.manifest.files if f.path.startswith("samples/")]
    assert grids == [*(f"samples/matching-00000{i}.png" for i in (1, 2)), *(f"samples/trajectory-00000{i}.png" for i in (1, 2, 3))]
    size = student.manifest.sampler.size_px.width if student.manifest.sampler else 0
    assert Image.open(student.path / grids[0]).size == (8 * size, size)
    assert "validated" not in student.manifest.metrics and student.manifest.metrics["composition"] == "not judged"
    unseen = runs.distill(str(chain.teacher.path), tmp_path / "unseen", micro("bench.per_task=0", f"prompts_file={own}"))
    assert digests(student)[TRANSFORMER] == digests(unseen)[TRANSFORMER]
    validated = micro("bench.per_task=0", f"prompts_file={own}", "distill.trajectory.validate_every=1")
    assert runs.distill(str(chain.teacher.path), tmp_path / "unseen", validated).path == unseen.path  # up to date


def test_on_policy_regression_changes_the_student(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.on_policy.iterations=2", "distill.on_policy.batch=4", "distill.on_policy.prompts=8")
    student = runs.distill(str(chain.teacher.path), tmp_path, recipe)
    assert digests(student)[TRANSFORMER] != digests(chain.student)[TRANSFORMER]
    phases = [json.loads(line)["phase"] for line in (student.path / "stats.jsonl").read_text().splitlines()]
    assert phases == ["trajectory", "on_policy", "matching"]
    with pytest.raises(UsageError, match=r"on_policy\.prompts=17 are the first of trajectory\.prompts=16"):
        micro("distill.on_policy.iterations=2", "distill.on_policy.prompts=17")


def test_strides_say_which_of_the_teachers_steps_the_student_takes(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.trajectory.teacher_steps=6", "distill.strides=[2, 1, 1, 2]")
    student = runs.distill(str(chain.teacher.path), tmp_path, recipe)
    fine = shifted_grid(6, 3.0)
    assert student.manifest.sampler is not None and student.manifest.sampler.sigmas == [fine[at] for at in (0, 2, 3, 4, 6)]
    assert trajectories.student_grid(micro("distill.trajectory.teacher_steps=12").distill, shifted_grid(12, 3.0)) == shifted_grid(4, 3.0)
    for wrong in ("[2, 2, 2]", "[2, 1, 1, 1]"):
        with pytest.raises(UsageError, match=r"strides must be 4 numbers whose sum is trajectory\.teacher_steps=6"):
            micro("distill.trajectory.teacher_steps=6", f"distill.strides={wrong}")


@pytest.mark.parametrize("kind", ["adapters", "finetune"])
def test_blocks_are_compiled_in_every_training(
    kind: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[str]
) -> None:
    for stage in (distill, finetune):
        monkeypatch.setattr(stage, "check_compiler", lambda _: None)
    curves = []
    for compiled in ("false", "true"):
        lora = ["distill.lora.rank=4"] if kind == "adapters" else []
        recipe = micro(
            f"distill.compile={compiled}",
            "distill.on_policy.iterations=1",
            "distill.on_policy.batch=4",
            "distill.on_policy.prompts=8",
            *lora,
        )
        if kind == "finetune":
            student = runs.finetune(str(chain.student.path), tmp_path / compiled, recipe)
        else:
            student = runs.distill(str(chain.teacher.path), tmp_path / compiled, recipe)
        assert traced == (["JointTransformerBlock.forward"] if compiled == "true" else [])
        curves.append([json.loads(line) for line in (student.path / "stats.jsonl").read_text().splitlines()])
    for eager, fused in zip(*curves, strict=True):
        for key in eager.keys() - {"phase", "time", "machine"}:
            assert fused[key] == pytest.approx(eager[key], rel=1e-3), (eager["phase"], key)


def test_compiling_wants_a_compiler(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro("distill.compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"there is no 'no-such-compiler'; .* --set distill\.compile=false"):
        runs.distill(str(chain.teacher.path), tmp_path / "out", recipe)
    with pytest.raises(MachineError, match=r"--set distill\.compile=false"):
        runs.finetune(str(chain.student.path), tmp_path / "out", recipe)
    with pytest.raises(MachineError, match=r"--set teacher\.flow\.compile=false"):
        runs.train(micro("teacher.flow.compile=true"), tmp_path / "teacher")


@pytest.mark.parametrize("name", ["distill", "finetune", "restructure"])
def test_moments_of_8_bits_want_their_package_and_unsharded_weights(name: str, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, recipe = runs.stage(name), micro("compute.optimizer_bits=8")
    refs = {next(iter(kind.takes)): (chain.teacher if name == "distill" else chain.student).path}
    monkeypatch.setattr(trainings, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match=r"pip install 'flashgen\[nf4\]'"):
        prepare(kind, refs, recipe)
    monkeypatch.setattr(trainings, "find_spec", lambda _: True)
    with pytest.raises(UsageError, match="does not go with FSDP2"):
        prepare(kind, refs, recipe, on=Machine(8e10, processes=2, accelerated=True, sharded=True))
    key = prepare(kind, refs, recipe).settings()
    assert key.pop("optimizer_bits") == 8 and key == prepare(kind, refs, micro()).settings()


def test_distill_starts_nothing_when_the_teacher_is_not_finite(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher.path, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / TRANSFORMER)
    weights["proj_out.bias"][0] = float("inf")
    save_file(weights, tmp_path / "broken" / TRANSFORMER, metadata={"format": "pt"})
    reseal(tmp_path / "broken")
    with pytest.raises(NumericsError, match=r"tensor proj_out\.bias holds numbers that are not finite"):
        runs.distill(str(tmp_path / "broken"), tmp_path / "out", micro())
    assert versions(tmp_path / "out") == []
