"""The prompts and trajectories that `distill`, `finetune` and `restructure-encoder` train on, kept in caches that their runs share.

A folder of a cache is named after everything that its contents depend on, so another learning rate finds the embeddings and the
trajectories of the run before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen import __version__
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.artifact.store import Artifact
from flashgen.flow.grid import shifted_grid
from flashgen.models.footprint import Footprint, Parts
from flashgen.recipe.distillation import DistillRecipe
from flashgen.recipe.schema import Recipe
from flashgen.runtime.accelerator import ALONE
from flashgen.stages.base import Stage
from flashgen.stages.trainings import guided_forwards

if TYPE_CHECKING:
    from torch import nn

    from flashgen.models.pipeline import Pipeline
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
    from flashgen.training.rollout import guidance_of

    config = recipe.distill.trajectory
    return TrajectorySource(teacher, shifted_grid(config.teacher_steps, shift), guidance_of(config, shift), order=2)


def cached_sizes(config: DistillRecipe, shift: float, followed: Sampler | None) -> tuple[int, int, int, list[int]]:
    """(states of trajectories, on-policy states, forward passes, [prompts of matching, of trajectories]) of what is cached.

    `followed` is the sampler of the student whose steps are learned; None: the guided teacher's are, on a grid with `shift`.
    """
    trajectory, on_policy = config.trajectory, config.on_policy
    prompts = config.matching.prompts if config.matching.iterations else 0
    if not config.needs_trajectories:
        return 0, 0, 0, [prompts, 0]
    per_trajectory = followed.num_steps if followed else guided_forwards(trajectory, shift)
    states, on_policy_states = (config.steps + 1) * trajectory.prompts, 0
    forwards = per_trajectory * trajectory.prompts
    if on_policy.iterations:
        forwards += (per_trajectory + config.steps) * on_policy.prompts
        on_policy_states = 2 * config.steps * on_policy.prompts  # both ends of each step
    return states, on_policy_states, forwards, [prompts, trajectory.prompts]


def stage_pool(stage: Stage, count: int, seed: int, pipe: Pipeline, sampler: Sampler, cache: Path) -> PromptPool:
    """`count` training prompts of the stage, encoded by `pipe`, which is of its first input; embeddings are kept in `cache`.

    Where they would take more than `prompts.cache_gib`, `pipe` encodes prompts as they are drawn.
    """
    return text_pool(stage, stage.training_prompts(count, seed), count, pipe, sampler, cache)


def text_pool(stage: Stage, texts: list[str], count: int, pipe: Pipeline, sampler: Sampler, cache: Path) -> PromptPool:
    """Like `stage_pool`, of `texts`, whose number of different ones is at most `count`."""
    from flashgen.training.prompts import drawn_pool, prompt_pool

    family, how = stage.family, [stage.family.name, sampler.encoder, sampler.tokens]
    encoders = [*family.text_encoders, *(encoder.tokenizer for encoder in family.text_encoders.values())]
    name = cache_name("prompts", stage.source, encoders, how)
    if not stored_prompts(stage, Footprint(stage.source), count):
        return drawn_pool(texts, pipe, sampler, name, pipe.device)
    return prompt_pool(texts, pipe, sampler, cache / name, pipe.device)


def stored_prompts(stage: Stage, footprint: Footprint, *counts: int) -> int:
    """Number of prompts, of pools of `counts` prompts, whose embeddings are stored: those of pools within `prompts.cache_gib`."""
    limit = stage.recipe.prompts.cache_gib
    return sum(count for count in counts if limit is None or count * footprint.conditioning_bytes() <= limit * 2**30)


def prompt_needs(stage: Stage, footprint: Footprint, *counts: int) -> tuple[float, Parts]:
    """(bytes of disk, memory while the stage trains) of pools of `counts` prompts."""
    from flashgen.models.prompts import BATCH

    stored, held = stored_prompts(stage, footprint, *counts), footprint.embedding(BATCH, embedding_room(stage))[0]
    drawn = {name: size for name, size in held.items() if name in footprint.encoders}
    return stored * footprint.conditioning_bytes(), Parts() if stored == sum(counts) else drawn


def embedding_room(stage: Stage) -> float:
    """Bytes that a large text encoder may take on the accelerator, 0 without one, while no other network is there."""
    return ALONE * (stage.machine.bytes or 0) if stage.machine.accelerated else 0.0


def cached_steps(
    stage: Stage, pool: PromptPool, steps_of: TrajectorySource, nodes: list[float], shape: tuple[int, ...], cache: Path, followed: Artifact
) -> Replay:
    """Cached steps along the trajectories of `steps_of`, whose network is that of `followed`; kept in `cache`.

    A share of the prompts is without the droppable text encoder.
    """
    config = stage.recipe.distill
    assert pool.key, "a pool whose prompts are not known"
    numbers = [config.lora.base if config.lora and stage.name == "distill" else None, stage.recipe.compute.precision]  # weights, passes
    how = [steps_of.sigmas, asdict(steps_of.guidance), steps_of.order, nodes, shape, stage.seed, pool.key, config.encoder_drop, numbers]
    how.append(config.compile)
    return _steps(stage, pool, steps_of, nodes, shape, cache / cache_name("trajectories", followed, ["transformer"], how))


def on_policy_steps(
    stage: Stage, pool: PromptPool, steps_of: TrajectorySource, nodes: list[float], shape: tuple[int, ...], work: Path, student: nn.Module
) -> Replay:
    """Steps of `steps_of` from the states that `student` visits; kept in `work`.

    On the first `on_policy.prompts` prompts, if `pool` holds the `trajectory.prompts`; on as large a share of another pool.
    """
    return _steps(stage, pool, steps_of, nodes, shape, work / "on_policy" / "x".join(map(str, shape)), student)


def own_steps(stage: Stage, student: nn.Module, pool: PromptPool, shape: tuple[int, ...], cache: Path) -> Replay:
    """Steps of `student`, the network of the stage's first input, along its own rollouts; kept in `cache`."""
    from flashgen.training.recovery import own_trajectories

    nodes, number = stage.sampler.sigmas, stage.recipe.compute.precision  # of the weights
    folder = cache / cache_name("trajectories", stage.source, ["transformer"], [nodes, shape, stage.seed, pool.key, number])
    return own_trajectories(student, pool, nodes, shape, stage.seed, folder, stage.micro_batch)


def _steps(
    stage: Stage,
    pool: PromptPool,
    steps_of: TrajectorySource,
    nodes: list[float],
    shape: tuple[int, ...],
    folder: Path,
    student: nn.Module | None = None,
) -> Replay:
    from flashgen.randomness import generator
    from flashgen.training.cache import cache_trajectories

    config = stage.recipe.distill
    pool = pool.dropping(config.encoder_drop, generator(stage.seed, DROP_STREAM))
    if student is not None:
        pool = pool.part(slice(-(-config.on_policy.prompts * len(pool) // config.trajectory.prompts)))
    return cache_trajectories(steps_of, pool, nodes, shape, stage.seed, folder, student=student, micro_batch=stage.micro_batch)


def cache_name(what: str, artifact: Artifact, parts: Iterable[str], how: list[Any]) -> str:
    """Name of a folder of the cache: a digest over the files of `artifact` in `parts`, the settings `how`, and flashgen's release."""
    files = sorted([file.path, file.sha256] for file in artifact.manifest.files if file.path.split("/")[0] in set(parts))
    return f"{what}-{hash_json([files, how, __version__.split('.')[:2]])[:16]}"
