"""Ten steps of each training against numbers that flashgen 0.2 (commit fbd6a15) gave: a refactoring must not change them.

On the machine that wrote golden.json the numbers are equal to every digit. The tolerance is for other processors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from flashgen.families.sd3 import SD3
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.restructuring import WithoutT5
from flashgen.families.sd3.sampling import teacher_sampler
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.grid import shifted_grid
from flashgen.pixels import Size
from flashgen.randomness import generator, seeded
from flashgen.recipe.compression import RestructureRecipe
from flashgen.recipe.distillation import LoraTraining, MatchingTraining, TrajectoryTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import FlowTraining
from flashgen.training import flow, loop, recovery, regression
from flashgen.training.cache import Replay
from flashgen.training.loop import Metric
from flashgen.training.matching import Matcher, Roles, Task
from flashgen.training.prompts import PromptPool
from flashgen.training.roles import roles_on
from flashgen.worlds.shapes.data import WORDS
from flashgen.worlds.shapes.scene import prompt_set

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
SHAPE, NODES, CHECKPOINT = (16, 4, 4), [1.0, 0.9, 0.75, 0.5, 0.0], CheckpointRecipe()
RATES = {"lr": 1e-3, "fake_score_lr": 1e-3, "batch": 4, "iterations": 10}
EVERY_TERM = {
    "point": "interval", "augmentation": "decoupled", "fake_score_target": "interval", "ida": 0.95, "muon_lr": 1e-3,
    "fake_score_muon_lr": 1e-3, "decay_share": 0.5, "fake_score_warmup": 2, "node_adversarial": [0, 1, 0, 1],
    "node_trajectory": [1, 0, 0.5, 0], "node_matching": [1, 0, 1, 1], "node_augmentation": [1, 0, 0.5, 0],
}  # fmt: skip
Build = Callable[[int], nn.Module]
TINY = replace(SPECS["tiny"], transformer=SPECS["tiny"].transformer | {"pos_embed_max_size": 16})  # as it was in 0.2
Rows = list[dict[str, float]]


@pytest.fixture
def transformer() -> Build:
    def build(seed: int) -> nn.Module:
        with seeded(seed):
            made: nn.Module = SD3Transformer2DModel(**TINY.transformer).eval().requires_grad_(False)
        return made

    return build


@pytest.fixture
def replay(pool: PromptPool) -> Replay:
    return Replay.from_states(torch.randn(len(pool), len(NODES), *SHAPE, generator=generator(5)).half(), pool)


def check(rows: Sequence[Mapping[str, Metric]], name: str) -> None:
    assert len(rows) == len(GOLDEN[name]) == 10
    for step, (row, golden) in enumerate(zip(rows, GOLDEN[name], strict=True)):
        assert {key: float(value) for key, value in row.items()} == pytest.approx(golden, rel=1e-4, abs=1e-7), f"step {step}"


@pytest.mark.parametrize(("name", "changes"), [("paper", {}), ("every term", EVERY_TERM)])
def test_matching_gives_the_golden_metrics(name: str, changes: dict[str, Any], transformer: Build, replay: Replay) -> None:
    config = MatchingTraining.model_validate(RATES | changes)
    task = Task("matching", replay.pool, NODES, SHAPE, 3, 0.5, replay)
    matcher = Matcher(task, Roles(transformer(0).requires_grad_(True), transformer(1)), config, replay.pool.family)
    check([matcher.update(step) for step in range(10)], name)


def test_matching_of_adapters_gives_the_golden_metrics(transformer: Build, replay: Replay) -> None:
    lora, config = LoraTraining(rank=4), MatchingTraining.model_validate(RATES | {"node_adversarial": [1.0]})
    teacher, student, fake_score = roles_on(
        transformer(0), lora, "student", "fake_score", seed=0, targets=SD3.lora_targets, checkpointing=True
    )
    task = Task("matching", replay.pool, NODES, SHAPE, 0, 0.5, replay)
    matcher = Matcher(task, Roles(student, teacher, fake_score), config, replay.pool.family)
    check([matcher.update(step) for step in range(10)], "adapters")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Rows]:
    """`recorded(module)`: loss and gradient norm of every step that the module takes from now on."""

    def record(module: ModuleType) -> Rows:
        rows: Rows = []

        def descend(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            loss, norm = loop.descend(*arguments, **options)
            rows.append({"loss": loss.item(), "grad_norm": norm.item()})
            return loss, norm

        monkeypatch.setattr(module, "descend", descend)
        return rows

    return record


def test_regression_gives_the_golden_losses(
    transformer: Build, replay: Replay, recorded: Callable[[ModuleType], Rows], tmp_path: Path
) -> None:
    rows, student = recorded(regression), transformer(0).requires_grad_(True)
    config = TrajectoryTraining(iterations=10, batch=4, huber=0.01, muon_lr=1e-3, node_draws=[1, 2, 3, 1])
    regression.regress(student, replay, NODES, config, 0, tmp_path, CHECKPOINT)
    check(rows, "regression")


def test_recovery_gives_the_golden_losses(
    transformer: Build, pool: PromptPool, recorded: Callable[[ModuleType], Rows], tmp_path: Path
) -> None:
    rows, nodes, config = recorded(recovery), shifted_grid(2, 3.0), RestructureRecipe(batch=4, muon_lr=1e-3)
    slim = transformer(0).requires_grad_(True)
    loss = recovery.pruned_loss(
        slim, recovery.own_trajectories(transformer(0), pool, nodes, SHAPE, 0, tmp_path / "own"), nodes, WithoutT5()
    )
    recovery.recover(slim, loss, config, 10, 0, tmp_path, CHECKPOINT, blocks=pool.family.blocks(slim))
    check(rows, "recovery")


def test_flow_training_gives_the_golden_losses(recorded: Callable[[ModuleType], Rows], tmp_path: Path) -> None:
    rows, pipe = recorded(flow), build_pipeline(TINY, 0, WORDS)
    captions = [request.caption() for request in prompt_set(0, 2)]
    latents = torch.randn(len(captions), *SHAPE, generator=torch.Generator().manual_seed(0))
    config, sampler = FlowTraining(steps=10, batch=4, compile=False), teacher_sampler(16, 16, Size(64, 64))
    flow.train_flow(pipe, latents, captions, config, sampler, 0, tmp_path, CHECKPOINT)
    check(rows, "flow")
