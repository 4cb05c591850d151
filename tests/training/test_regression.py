"""Stage 1: the regression onto cached steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning
from flashgen.flow.grid import shifted_grid
from flashgen.randomness import generator
from flashgen.recipe.distillation import DistillRecipe, TrajectoryTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.cache import Replay
from flashgen.training.prompts import PromptPool
from flashgen.training.regression import regress

SHAPE = (16, 4, 4)
CHECKPOINT = CheckpointRecipe()
Build = Callable[[int], nn.Module]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def replay(transformer: Build, pool: PromptPool) -> Replay:
    """Two steps of some trajectories."""
    return Replay.from_states(torch.randn(len(pool), 3, *SHAPE, generator=generator(0, 1)).half(), pool)


def test_trajectory_training_lowers_its_loss(transformer: Build, replay: Replay, pool: PromptPool, tmp_path: Path) -> None:
    student, nodes = transformer(0).requires_grad_(True), shifted_grid(2, 3.0)
    x_from, x_to, cond = replay.at(torch.arange(8), torch.zeros(8, dtype=torch.long))
    config = TrajectoryTraining(iterations=30, batch=8, lr=3e-3)

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            target = (x_to - x_from) / (nodes[1] - nodes[0])
            return float((velocity(net, x_from, torch.ones(8), cond) - target).square().mean())

    start = loss(student)
    regress(student, replay, nodes, config, 0, tmp_path, CHECKPOINT)
    assert loss(student) < 0.9 * start


def test_steps_are_drawn_as_often_as_the_recipe_says(
    transformer: Build, replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, at = list[Tensor](), Replay.at

    def watched(self: Replay, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        seen.append(node)
        return at(self, rows, node)

    monkeypatch.setattr(Replay, "at", watched)
    for draws, share in (([1.0], 0.5), ([1.0, 7.0], 7 / 8), ([0.0, 1.0], 1.0)):
        config = TrajectoryTraining(iterations=1, batch=512, node_draws=draws)
        regress(transformer(0).requires_grad_(True), replay, shifted_grid(2, 3.0), config, 0, tmp_path / str(draws), CHECKPOINT)
        assert seen.pop().float().mean().item() == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("draws", [[1, 2, 3], [1, -1], [0], []])
def test_draws_that_fit_no_grid_are_refused(draws: list[float]) -> None:
    with pytest.raises(ValueError, match="node_draws"):
        DistillRecipe(steps=2, trajectory=TrajectoryTraining(node_draws=draws))


def test_validation_gets_the_averaged_weights_after_every_so_many_steps_and_the_last(
    transformer: Build, replay: Replay, tmp_path: Path
) -> None:
    student, config = transformer(0).requires_grad_(True), TrajectoryTraining(iterations=5, batch=4, lr=1e-2, validate_every=2)
    shown: dict[str, list[Tensor]] = {}

    def validate(name: str, network: nn.Module) -> None:
        shown[name] = weights(network)

    regress(student, replay, shifted_grid(2, 3.0), config, 0, tmp_path, CHECKPOINT, validate=validate)
    assert list(shown) == ["trajectory-000002", "trajectory-000004", "trajectory-000005"]
    assert same(shown["trajectory-000005"], weights(student)) and not same(shown["trajectory-000004"], weights(student))
