"""The trajectories that `distill` and `finetune` train on."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.flow.grid import shifted_grid
from flashgen.recipe.distillation import DistillRecipe
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import Stage

if TYPE_CHECKING:
    from torch import nn

    from flashgen.training.cache import Replay, TrajectorySource
    from flashgen.training.prompts import PromptPool

DROP_STREAM = 14


def student_grid(config: DistillRecipe, sigmas: list[float]) -> list[float]:
    """The entries of `sigmas`, the grid that is followed, at which the student steps."""
    strides = config.strides or [(len(sigmas) - 1) // config.steps] * config.steps
    return [sigmas[at] for at in accumulate(strides, initial=0)]


def guided_teacher(teacher: nn.Module, shift: float, recipe: Recipe) -> TrajectorySource:
    """The guided teacher as a source of trajectories, with second-order steps."""
    from flashgen.training.cache import TrajectorySource

    config = recipe.distill.trajectory
    return TrajectorySource(teacher, shifted_grid(config.teacher_steps, shift), config.guidance, order=2)


def cached_steps(
    stage: Stage,
    pool: PromptPool,
    steps_of: TrajectorySource,
    nodes: list[float],
    shape: tuple[int, ...],
    work: Path,
    student: nn.Module | None = None,
) -> Replay:
    """Cached steps of `steps_of`, a share of the prompts without the droppable text encoder."""
    import torch

    from flashgen.randomness import generator
    from flashgen.training.cache import cache_trajectories

    config = stage.recipe.distill
    pool = pool.dropping(config.encoder_drop, generator(stage.seed, DROP_STREAM))
    if student is not None:
        pool = pool.first(config.on_policy.prompts)
    if config.compile:
        compiled: Any = torch.compile(steps_of.net, dynamic=False)
        steps_of = replace(steps_of, net=compiled)
    return cache_trajectories(steps_of, pool, nodes, shape, stage.seed, work, student=student)
