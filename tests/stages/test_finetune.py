"""finetune: branches, their merge and its choice, with and without a judge; and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashgen.artifact.store import Artifact, versions
from flashgen.errors import ArtifactError, NumericsError, UsageError
from flashgen.stages import finetune
from flashgen.training.matching import Matcher
from tests import runs
from tests.stages.chain import TRANSFORMER, Chain, digests, judged, micro


def test_a_restructured_student_is_fine_tuned_too(chain: Chain, tmp_path: Path) -> None:
    tuned = runs.finetune(str(chain.prune.path), tmp_path, micro("finetune.merge_high=[0.7]", "finetune.allow_worse=1"))
    assert {p.role: p.digest for p in tuned.manifest.parents}["teacher"] == chain.teacher.manifest.digest
    assert tuned.manifest.sampler is not None and tuned.manifest.sampler.encoder == "prune"


def test_finetune_is_redone_when_the_encoder_drop_it_trains_with_changes(chain: Chain, tmp_path: Path) -> None:
    tiny = micro("finetune.matching.iterations=0")
    first = runs.finetune(str(chain.student.path), tmp_path, tiny)
    changed = micro("finetune.matching.iterations=0", "distill.encoder_drop=0.9")
    assert runs.finetune(str(chain.student.path), tmp_path, changed).path != first.path


def test_finetune_refuses_a_teacher_that_is_not_the_students(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher.path, tmp_path / "teacher")
    student = runs.distill(str(tmp_path / "teacher"), tmp_path / "student", micro("distill.matching.iterations=0"))
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ArtifactError, match="teacher"):
        runs.finetune(str(student.path), tmp_path / "out", micro())
    other = runs.random("tiny", tmp_path / "other", 9, False)
    shutil.copytree(other.path, tmp_path / "teacher")
    with pytest.raises(ArtifactError, match=r"is not the one .* was made from"):
        runs.finetune(str(student.path), tmp_path / "out", micro())


def test_finetune_with_adapters_publishes_a_dense_student_and_resumes(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("finetune.lora.rank=2", "finetune.merge_high=[0.3]", "finetune.matching.lr=1e-2", "finetune.allow_worse=1")
    tuned = runs.finetune(str(chain.student.path), tmp_path, recipe)
    before, after = (load_file(a.path / TRANSFORMER) for a in (chain.student, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(re.search(r"to_|add_|net", name) for name in changed)
    assert runs.finetune(str(chain.student.path), tmp_path, recipe).path == tuned.path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("finetune.matching.node_matching=[1.0, 1.0]", "one for each of the 4"),
        ("finetune.matching.ida=0.9", "adapters of different networks"),
        ("finetune.lora.base=bfloat16", "leave finetune.lora.base out"),
    ],
)
def test_finetune_refuses_impossible_recipes_before_any_work(change: str, told: str, chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        runs.finetune(str(chain.student.path), tmp_path, micro(change, "finetune.lora.rank=2"))
    with pytest.raises(UsageError, match=told):
        runs.plan("finetune", {"student": str(chain.student.path)}, tmp_path, micro(change, "finetune.lora.rank=2"))
    assert not any(tmp_path.iterdir())


def test_finetune_of_two_steps_leaves_the_low_branch_alone(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("distill.steps=2", "distill.matching.iterations=0", "finetune.merge_high=[0.0]")
    student = runs.distill(str(chain.teacher.path), tmp_path / "student", recipe)
    tuned = runs.finetune(str(student.path), tmp_path / "tuned", recipe)
    before, after = load_file(student.path / TRANSFORMER), load_file(tuned.path / TRANSFORMER)
    assert all(torch.equal(before[name], after[name]) for name in before)  # all low: nothing was trained
    high = runs.finetune(str(student.path), tmp_path / "tuned", micro("distill.steps=2", "finetune.merge_high=[1.0]"))
    assert digests(high)[TRANSFORMER] != digests(student)[TRANSFORMER]


def test_finetune_publishes_the_merge_that_does_best_on_the_choice_prompts(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, 0.5, 0.4, 0.6, 0.6)
    tuned = runs.finetune(str(chain.student.path), tmp_path / "out", micro("finetune.merge_high=[0.0, 1.0, 0.5]"))
    assert tuned.manifest.metrics["choice"] == {"input": 0.5, "merge 0": 0.4, "merge 1": 0.6, "merge 0.5": 0.6}
    assert tuned.manifest.metrics["merge_high"] == 1.0
    judged(monkeypatch, 0.5, 0.5)
    alone = runs.finetune(str(chain.student.path), tmp_path / "high", micro("finetune.merge_high=[1.0]", "finetune.allow_worse=1"))
    assert digests(alone)[TRANSFORMER] == digests(tuned)[TRANSFORMER]


def test_finetune_publishes_nothing_below_its_input_unless_told(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, out = "finetune.merge_high=[0.5]", tmp_path / "out"
    judged(monkeypatch, 0.5, 0.49)
    with pytest.raises(NumericsError, match=r"0\.500 -> 0\.490 .*allow_worse=0 below.*allow_worse=1 publishes"):
        runs.finetune(str(chain.student.path), out, micro(merge, "finetune.allow_worse=0"))
    assert versions(out) == []
    monkeypatch.setattr(Matcher, "update", lambda *_: pytest.fail("the branches are trained already"))
    judged(monkeypatch, 0.5, 0.3)
    with pytest.raises(NumericsError, match=r"allow_worse=0\.1 below"):
        runs.finetune(str(chain.student.path), out, micro(merge, "finetune.allow_worse=0.1"))
    judged(monkeypatch, 0.5, 0.49)
    told = micro(merge, "finetune.allow_worse=0.1")
    assert runs.finetune(str(chain.student.path), out, told).manifest.metrics["choice"]["merge 0.5"] == 0.49


def test_the_control_spends_the_updates_of_both_branches_on_one_network(chain: Chain, tmp_path: Path) -> None:
    plain = runs.finetune(str(chain.student.path), tmp_path, micro("finetune.control=true", "finetune.allow_worse=1"))
    rows = [json.loads(line) for line in (plain.path / "stats.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [("control", 5)]  # 1 for the fake score alone, 2 x 2 updates


def test_branches_are_validated_merged(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.5, 0.4, 0.6, 0.7, 0.4, 0.5)  # the input, two validations of either branch, the merge
    seen: list[dict[str, torch.Tensor]] = []
    merge = finetune.merge

    def recorded(target: torch.nn.Module, high: torch.nn.Module, low: torch.nn.Module, weight_high: float) -> None:
        merge(target, high, low, weight_high)
        seen.append({name: value.clone() for name, value in target.state_dict().items()})

    monkeypatch.setattr(finetune, "merge", recorded)
    recipe = micro("finetune.matching.validate_every=1", "finetune.merge_high=[0.5]", "finetune.matching.lr=1e-3")
    tuned = runs.finetune(str(chain.student.path), tmp_path / "out", recipe)
    rows = [json.loads(line) for line in (tuned.path / "stats.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["score"]) for row in rows] == [("high", 0.5), ("low", pytest.approx(0.55))]  # means
    assert all(torch.equal(seen[2][name], value) for name, value in seen[4].items())  # both ended with their best validation
    assert not torch.equal(seen[1]["proj_out.weight"], seen[0]["proj_out.weight"])


def test_finetune_follows_the_teacher_through_its_students_own_sigmas(chain: Chain, tmp_path: Path) -> None:
    adversarial = ["finetune.matching.node_adversarial=[0, 0, 0, 1]", "distill.trajectory.teacher_steps=6"]
    with pytest.raises(UsageError, match=r"teacher_steps=6 skips the student's sigma 0\.9, 0\.5; --set"):
        runs.finetune(str(chain.student.path), tmp_path / "out", micro(*adversarial))
    assert not (tmp_path / "out").exists()


def test_the_adversarys_real_pictures_are_cached_for_finetune_too(chain: Chain, tmp_path: Path) -> None:
    recipe = micro("finetune.matching.node_adversarial=[0, 0, 0, 1]", "finetune.allow_worse=1")
    tuned = runs.finetune(str(chain.student.path), tmp_path, recipe)
    rows = {row["phase"]: row for row in map(json.loads, (tuned.path / "stats.jsonl").read_text().splitlines())}
    assert "logit_real" in rows["low"] and "logit_real" not in rows["high"]


# without a judge


@pytest.fixture(scope="module")
def outside(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, str]:
    """(student of a teacher that belongs to no world, the setting that names its prompts)"""
    out = tmp_path_factory.mktemp("outside")
    (out / "prompts.txt").write_text("a lighthouse\nan old boat\na red car\n")
    prompts = f"prompts_file={out / 'prompts.txt'}"
    top = runs.random("tiny", out / "teacher", world=None)
    return runs.distill(str(top.path), out / "student", micro(prompts, "distill.matching.iterations=0")), prompts


def test_one_merge_ratio_needs_no_judge(outside: tuple[Artifact, str], tmp_path: Path) -> None:
    student, prompts = outside
    assert student.manifest.world is None and student.manifest.metrics["composition"] == "not judged"
    tuned = runs.finetune(str(student.path), tmp_path / "out", micro(prompts, "finetune.merge_high=[0.7]"))
    metrics = tuned.manifest.metrics
    assert (metrics["choice"], metrics["composition"], metrics["merge_high"]) == ("not judged", "not judged", 0.7)
    assert tuned.manifest.world is None and digests(tuned)[TRANSFORMER] != digests(student)[TRANSFORMER]
    assert "samples/validation.png" in digests(tuned)  # drawn from the recipe's own prompts
    same = runs.finetune(str(student.path), tmp_path / "out", micro(prompts, "finetune.merge_high=[0.7]", "finetune.allow_worse=1"))
    assert same.path == tuned.path


def test_several_merge_ratios_need_a_judge(outside: tuple[Artifact, str], chain: Chain, tmp_path: Path) -> None:
    student, prompts = outside
    for source, more in ((student, prompts), (chain.student, "bench.per_task=0")):
        with pytest.raises(UsageError, match=r"leaves a choice.*--set finetune\.merge_high=\[0\.7\].*--set bench\.per_task=1 or more"):
            runs.finetune(str(source.path), tmp_path / "out", micro(prompts, more, "finetune.merge_high=[0.3, 0.7]"))
    assert not (tmp_path / "out").exists()
    control = micro(prompts, "finetune.merge_high=[0.5]", "finetune.control=true", "bench.per_task=0")
    assert runs.finetune(str(chain.student.path), tmp_path / "out", control).manifest.metrics["merge_high"] == 1.0


def test_a_judge_that_is_there_is_asked_even_about_one_ratio(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, 0.5, 0.6)
    tuned = runs.finetune(str(chain.student.path), tmp_path / "out", micro("finetune.merge_high=[0.7]"))
    assert tuned.manifest.metrics["choice"] == {"input": 0.5, "merge 0.7": 0.6}
