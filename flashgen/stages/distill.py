"""flashgen distill: trajectory guidance, corrections of the student's own steps, then distribution matching with timestep sharing."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, begin
from flashgen.flow.grid import shifted_grid
from flashgen.processes import sharded
from flashgen.recipe.schema import DistillRecipe, MatchingTraining, Recipe
from flashgen.stages.checks import check_compiler, check_distillation, check_recipe
from flashgen.stages.plan import check
from flashgen.stages.prompts import own_prompts, prompts_key
from flashgen.stages.teacher import open_teacher

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import nn

    from flashgen.training.trajectories import Leader, Replay

T5_STREAM = 14
LOOKS = {"trajectory": {"watch_every"}, "correction": {"watch_every"}}  # change nothing of the student


def run(teacher: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    config = recipe.distill
    check_recipe(recipe)
    parent = open_teacher(teacher, out)
    assert parent.manifest.sampler is not None
    start = check_distillation(parent, recipe)
    looks = {"per_task": recipe.bench.per_task} if config.matching.watch_every else {}  # which the best round depends on
    parents = [parent.as_parent("teacher"), *([start.as_parent("start")] if start else [])]
    draft = begin(
        out, kind="student", stage="distill", recipe=config.model_dump(exclude=LOOKS) | looks | prompts_key(recipe), seed=seed,
        parents=parents, force=force, check=lambda work: check("distill", parent, recipe, work),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    if config.compile and config.wants_trajectories:
        check_compiler("distill.compile=false")
    import torch

    from flashgen.models.sample import latent_shape, load_pipeline
    from flashgen.models.save import save_changed, save_tensors
    from flashgen.stages.report import finish, watcher
    from flashgen.training.matching import Matcher, train_matching
    from flashgen.training.prompts import prompt_pool
    from flashgen.training.roles import Role, roles_on
    from flashgen.training.shards import shard, whole_network
    from flashgen.training.trajectories import Leader, train_on_trajectories

    taught = parent.manifest.sampler.model_copy(update={"size_px": config.size_px or parent.manifest.sampler.size_px})
    text = load_pipeline(parent.path, weights="text")  # first, and alone: no transformer is in memory while prompts are embedded
    pools = [(config.matching.prompts, seed + 1)] if config.matching.iterations else []
    pools += [(config.trajectory.prompts, seed)] if config.wants_trajectories else []
    for count, own_seed in pools:
        prompt_pool(text, count, own_seed, taught.t5_tokens, draft.work, own_prompts(recipe))
    del text
    pipe = load_pipeline(parent.path, getattr(torch, config.lora.base) if config.lora else torch.float32)
    teacher_net: nn.Module = pipe.transformer.requires_grad_(False)
    student: nn.Module
    proxy: nn.Module | None
    if config.lora:
        teacher_net, student, proxy = roles_on(pipe.transformer, config.lora, "student", "proxy", seed=seed)
    else:
        begun = load_pipeline(start.path).transformer if start else copy.deepcopy(teacher_net)
        student, proxy = shard(begun.requires_grad_(True)), None
    shape = latent_shape(pipe, taught.size_px)

    if start and config.follow == "start":
        assert start.manifest.sampler is not None
        leader = Leader(copy.deepcopy(student).requires_grad_(False), start.manifest.sampler.sigmas)
    else:
        leader = guided(teacher_net, taught.shift, recipe)
    nodes = student_grid(config, leader.sigmas)
    sampler = Sampler(**{**taught.model_dump(), "sigmas": nodes, "guidance": 1.0, "trained_steps": [config.steps], "scales": None})
    watch, compiled = watcher(pipe, sampler, recipe, draft.work), config.compile
    replay = cached(pipe, leader, nodes, taught, recipe, seed, draft.work) if config.wants_trajectories else None
    if sharded():  # now: the cache wants the whole teacher, with which each process goes its own way, and a sharded one has no copy
        proxy = shard(copy.deepcopy(teacher_net).requires_grad_(True))
        shard(teacher_net)
    if replay and config.trajectory.iterations:
        train_on_trajectories(student, replay, nodes, config.trajectory, seed, draft.work, "trajectory", compiled, watch)
    if replay and config.correction.iterations:
        replay = replay.and_also(cached(pipe, leader, nodes, taught, recipe, seed, draft.work, student=student))
        train_on_trajectories(student, replay, nodes, config.correction, seed, draft.work, "correction", compiled, watch)

    del leader  # a network more where it is a student
    kept = {}
    if config.matching.iterations:
        pool = prompt_pool(pipe, config.matching.prompts, seed + 1, taught.t5_tokens, draft.work, own_prompts(recipe))
        matcher = Matcher(
            "matching", student, teacher_net, pool, nodes, config.matching, shape, seed, t5_drop=config.t5_drop, proxy=proxy, replay=replay
        )

        def keep_last() -> None:
            for optimizer in (*matcher.optimizers, *matcher.proxy_optimizers):
                optimizer.state.clear()  # saved; writing needs room of its own
            value = student.merged if isinstance(student, Role) else whole_network(student).state_dict().__getitem__
            save_tensors(draft.path / "last", parent.path / "transformer", value)

        kept = train_matching(matcher, draft.work, watch, keep_last)
        del matcher  # optimizers and averages: writing needs room of its own

    if isinstance(student, Role):
        save_tensors(draft.path / "transformer", parent.path / "transformer", student.merged)
        save_changed(draft, parent.path, {}, kept=("transformer",))
    else:
        save_changed(draft, parent.path, {"transformer": whole_network(student)})
    return finish(draft, sampler, recipe.bench, metrics={"watched": kept} if kept else {})


def student_grid(config: DistillRecipe, sigmas: list[float]) -> list[float]:
    """Those of a leader's `sigmas` that `strides` lead to."""
    strides = config.strides or [(len(sigmas) - 1) // config.steps] * config.steps
    return [sigmas[at] for at in accumulate(strides, initial=0)]


def guided(teacher: nn.Module, shift: float, recipe: Recipe) -> Leader:
    """The teacher as leader."""
    from flashgen.training.trajectories import Leader

    config = recipe.distill.trajectory
    return Leader(teacher, shifted_grid(config.teacher_steps, shift), config.guidance, order=2)


def cached(
    pipe: StableDiffusion3Pipeline,
    leader: Leader,
    nodes: list[float],
    taught: Sampler,
    recipe: Recipe,
    seed: int,
    work: Path,
    student: nn.Module | None = None,
) -> Replay:
    """The leader's trajectories over `nodes`, or its corrections of `student`; a share of the prompts without T5."""
    import torch

    from flashgen.models.sample import latent_shape
    from flashgen.randomness import generator
    from flashgen.training.prompts import prompt_pool
    from flashgen.training.trajectories import cache_trajectories

    config = recipe.distill
    whole = prompt_pool(pipe, config.trajectory.prompts, seed, taught.t5_tokens, work, own_prompts(recipe))
    pool = whole.dropping_t5(config.t5_drop, generator(seed, T5_STREAM))
    shape = latent_shape(pipe, taught.size_px)
    if student is not None:
        pool = pool.first(config.correction.prompts)
    if config.compile:
        compiled: Any = torch.compile(leader.net, dynamic=False)
        leader = replace(leader, net=compiled)
    return cache_trajectories(leader, pool, nodes, shape, seed, work, student=student)


def replay_for(
    matching: MatchingTraining,
    recipe: Recipe,
    pipe: StableDiffusion3Pipeline,
    teacher: nn.Module,
    sampler: Sampler,
    seed: int,
    work: Path,
) -> Replay | None:
    """Trajectories of the teacher when a term of `matching` needs them."""
    if not matching.wants_trajectories(len(sampler.sigmas) - 1):
        return None
    return cached(pipe, guided(teacher, sampler.shift, recipe), sampler.sigmas, sampler, recipe, seed, work)
