"""Trackers that a stage is asked for, what it says that a step costs, and the teacher's guidance in plans and caches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from torch import nn

from flashgen.artifact.store import Artifact
from flashgen.errors import MachineError, UsageError
from flashgen.models.footprint import Footprint
from flashgen.recipe.load import load
from flashgen.stages import trajectories
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.tracking import step_costs


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tiny_teacher: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    prepare(Distill, {"teacher": tiny_teacher.path}, load("shapes-demo", []))
    wanted = load("shapes-demo", ["log.trackers=[tensorboard, wandb]"])
    with pytest.raises(MachineError, match=r"log.trackers: tensorboard, wandb is not installed; pip install .*--set log.trackers=\[\]"):
        prepare(Distill, {"teacher": tiny_teacher.path}, wanted)
    assert MachineError.exit_code == 5


def test_costs_of_steps_add_up_to_the_plan(tiny_teacher: Artifact) -> None:
    settings = ["distill.trajectory.iterations=3", "distill.on_policy.iterations=0", "distill.matching.iterations=5", "bench.per_task=0"]
    stage = prepare(Distill, {"teacher": tiny_teacher.path}, load("shapes-demo", [*settings, "distill.matching.fake_score_warmup=0"]))
    without = load("shapes-demo", [*settings, "distill.trajectory.iterations=0", "distill.matching.iterations=0"])
    costs, plan = step_costs(stage), stage.plan()
    assert plan is not None
    one, distill = Footprint(tiny_teacher).forward().multiply_adds, stage.recipe.distill
    trajectories = distill.trajectory.prompts * distill.trajectory.teacher_steps * 2
    trained = 3 * costs["trajectory"].multiply_adds + 5 * costs["matching"].multiply_adds
    assert trained / one + trajectories == pytest.approx(plan.forwards)
    assert (costs["trajectory"].samples, costs["matching"].samples) == (distill.trajectory.batch, distill.matching.batch)
    nothing = prepare(Distill, {"teacher": tiny_teacher.path}, without).plan()
    assert nothing is not None and nothing.forwards == 0


def test_skip_layers_and_a_guidance_interval_are_counted_by_the_plan(tiny_teacher: Artifact) -> None:
    def forwards(*settings: str) -> float:
        whole = ["distill.on_policy.iterations=0", "distill.trajectory.prompts=100", "distill.trajectory.teacher_steps=32", *settings]
        plan = prepare(Distill, {"teacher": tiny_teacher.path}, load("shapes-demo", whole)).plan()
        assert plan is not None
        return plan.forwards

    plain, skip = forwards(), "skip_layers={blocks: [1]}"
    assert forwards(f"distill.trajectory.{skip}") == plain + 100 * 6  # of 32 steps, those from 0.01 to 0.2 of the way
    assert forwards("distill.trajectory.guidance_interval=[0.0, 0.75]") == plain - 100 * 16  # sigma 0.75 is in the middle
    matching = load("shapes-demo", []).distill.matching
    assert forwards(f"distill.matching.{skip}") == plain + matching.iterations * matching.batch


def test_blocks_that_the_transformer_does_not_have_are_refused(tiny_teacher: Artifact) -> None:
    for part in ("trajectory", "matching"):
        recipe = load("shapes-demo", [f"distill.{part}.skip_layers={{blocks: [1, 7]}}"])
        with pytest.raises(UsageError, match=rf"distill\.{part}\.skip_layers\.blocks=\[1, 7\]: the transformer's blocks are 0 to 1"):
            prepare(Distill, {"teacher": tiny_teacher.path}, recipe)


def test_trajectories_of_other_guidance_are_cached_under_another_name(
    tiny_teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "_steps", lambda *arguments: arguments[5])
    pool: Any = SimpleNamespace(key="prompts")

    def folder(*settings: str) -> Path:
        recipe = load("shapes-demo", ["distill.trajectory.teacher_steps=4", "distill.trajectory.guidance=4.5", *settings])
        stage = prepare(Distill, {"teacher": tiny_teacher.path}, recipe, 5)
        source = trajectories.guided_teacher(nn.Identity(), 3.0, recipe)
        named: Any = trajectories.cached_steps(stage, pool, source, [1.0, 0.0], (16, 4, 4), tmp_path, tiny_teacher)
        return Path(named)

    more = ("skip_layers={blocks: [1]}", "skip_layers={blocks: [0]}", "guidance_interval=[0.1, 0.9]")
    assert folder() == folder() and len({folder(), *(folder(f"distill.trajectory.{setting}") for setting in more)}) == 4
