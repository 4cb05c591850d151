"""flashgen distill: trajectory guidance, then distribution matching with timestep sharing."""

from __future__ import annotations

import copy
from pathlib import Path

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, begin
from flashgen.errors import UsageError
from flashgen.recipe.schema import Recipe
from flashgen.stages.teacher import open_teacher


def run(teacher: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    config = recipe.distill
    if config.trajectory.teacher_steps % config.steps:
        given = f"distill.trajectory.teacher_steps={config.trajectory.teacher_steps} is no multiple of distill.steps={config.steps}"
        raise UsageError(f"{given}; the grids must nest")
    parent = open_teacher(teacher, out)
    draft = begin(
        out, kind="student", stage="distill", recipe=config.model_dump(), seed=seed, parents=[parent.as_parent("teacher")], force=force
    )
    if isinstance(draft, Artifact):
        return draft
    from flashgen.flow.grid import few_step_grid, teacher_grid
    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish
    from flashgen.training.matching import train_matching
    from flashgen.training.prompts import prompt_pool
    from flashgen.training.trajectories import cache_trajectories, train_on_trajectories

    taught = parent.manifest.sampler
    assert taught is not None
    nodes = few_step_grid(config.steps, taught.shift)
    pipe = load_pipeline(parent.path)
    teacher_net = pipe.transformer.requires_grad_(False)
    student = copy.deepcopy(teacher_net).requires_grad_(True)
    shape = (pipe.transformer.config.in_channels, taught.size_px // 8, taught.size_px // 8)

    pool = prompt_pool(pipe, config.trajectory.prompts, seed, taught.t5_tokens)
    fine = teacher_grid(config.trajectory.teacher_steps, taught.shift)
    states = cache_trajectories(teacher_net, pool, nodes, fine, shape, config.trajectory.guidance, seed, draft.work)
    train_on_trajectories(student, states, pool, nodes, config.trajectory, config.t5_drop, seed, draft.work)

    pool = prompt_pool(pipe, config.matching.prompts, seed + 1, taught.t5_tokens)
    train_matching("matching", student, teacher_net, pool, nodes, config.matching, shape, seed, draft.work, t5_drop=config.t5_drop)

    save_changed(draft, parent.path, {"transformer": student})
    sampler = Sampler(**{**taught.model_dump(), "sigmas": nodes, "guidance": 1.0, "trained_steps": [config.steps]})
    return finish(draft, sampler, recipe.bench)
