"""flashgen finetune: one branch for high noise, one for low noise, merged into a single checkpoint (split-timestep)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.errors import ArtifactError
from flashgen.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    config = recipe.finetune
    parent = open_artifact(student, ("student",))
    teacher = _teacher_of(parent)
    draft = begin(
        out, kind="student", stage="finetune", recipe=config.model_dump() | {"t5_drop": recipe.distill.t5_drop}, seed=seed,
        parents=[parent.as_parent("student"), teacher.as_parent("teacher")], force=force,
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish
    from flashgen.training.matching import train_matching
    from flashgen.training.prompts import prompt_pool

    sampler = parent.manifest.sampler
    assert sampler is not None
    nodes = sampler.sigmas
    pipe = load_pipeline(parent.path)
    teacher_net = load_pipeline(teacher.path).transformer.requires_grad_(False)
    shape = (pipe.transformer.config.in_channels, sampler.size_px // 8, sampler.size_px // 8)
    pool = prompt_pool(pipe, config.matching.prompts, seed + 2, sampler.t5_tokens)

    high, low = (copy.deepcopy(pipe.transformer).requires_grad_(True) for _ in range(2))
    branches = {"high": (high, [i for i, s in enumerate(nodes[:-1]) if s > config.split])}
    branches["low"] = (low, [i for i, s in enumerate(nodes[:-1]) if s <= config.split])

    def net_at(sigma: float) -> nn.Module:
        return high if sigma > config.split else low  # type: ignore[no-any-return]

    for number, (name, (branch, own)) in enumerate(branches.items()):
        if own:  # with two steps the low branch has no node and keeps its weights
            train_matching(
                name, branch, teacher_net, pool, nodes, config.matching, shape, seed + 10 + number, draft.work,
                t5_drop=recipe.distill.t5_drop, train_nodes=own, net_at=net_at,
            )  # fmt: skip
    merge(pipe.transformer, high, low, config.merge_high)
    save_changed(draft, parent.path, {"transformer": pipe.transformer})
    return finish(draft, sampler, recipe.bench)


def merge(target: nn.Module, high: nn.Module, low: nn.Module, weight_high: float) -> None:
    """target <- low + weight_high (high - low), parameter by parameter (SD3.5-Flash: 3:7; which side gets 7 is our choice)."""
    import torch

    with torch.no_grad():
        for into, h, lo in zip(target.parameters(), high.parameters(), low.parameters(), strict=True):
            into.copy_(torch.lerp(lo, h, weight_high))


def _teacher_of(student: Artifact) -> Artifact:
    """The teacher in the student's lineage, by path, checked by digest."""
    for parent in student.manifest.parents:
        if parent.role == "teacher":
            teacher = open_artifact(parent.path, ("teacher",))
            if teacher.manifest.digest != parent.digest:
                raise ArtifactError(f"the teacher at {parent.path} is not the one {student.path} was made from; distill again")
            return teacher
    raise ArtifactError(f"{student.path} names no teacher; finetune takes the output of flashgen distill")
