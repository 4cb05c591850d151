"""flashgen finetune: one branch for high noise, one for low noise, merged into a single checkpoint (split-timestep)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.errors import ArtifactError, NumericsError
from flashgen.progress import say
from flashgen.recipe.schema import LoraTraining, Recipe
from flashgen.stages.checks import check_compiler, check_finetuning, check_unsharded
from flashgen.stages.distill import replay_for
from flashgen.stages.plan import check
from flashgen.stages.prompts import own_prompts, prompts_key

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import nn

    from flashgen.artifact.manifest import Sampler


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    config = recipe.finetune
    check_unsharded()
    parent = open_artifact(student, ("student",))
    teacher = _teacher_of(parent)
    sampler = parent.manifest.sampler
    assert sampler is not None
    follows = check_finetuning(parent, recipe)
    draft = begin(
        out, kind="student", stage="finetune", recipe=_recipe(recipe, follows), seed=seed,
        parents=[parent.as_parent("student"), teacher.as_parent("teacher")], force=force,
        check=lambda work: check("finetune", parent, recipe, work),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    if recipe.distill.compile and follows:
        check_compiler("distill.compile=false")
    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish, verdicts

    pipe = load_pipeline(parent.path)
    before = verdicts(pipe, sampler, recipe.bench)
    high, low = train_branches(pipe, load_pipeline(teacher.path).transformer, sampler, recipe, seed, draft.work)
    found = {}
    for ratio in config.merge_high if high is not low else [1.0]:
        merge(pipe.transformer, high, low, ratio)
        found[ratio] = verdicts(pipe, sampler, recipe.bench)
        say(f"merged {ratio:g} high : {1 - ratio:g} low: composition {found[ratio].mean():.3f} on {len(before)} choice prompts")
    best = max(found, key=lambda ratio: found[ratio].mean())
    say(f"input {before.mean():.3f}, best merge {best:g}: {found[best].mean():.3f}")
    if before.mean() - found[best].mean() > config.allow_worse:
        raise NumericsError(
            f"fine-tuning made the student worse: composition {before.mean():.3f} -> {found[best].mean():.3f} on {len(before)} prompts, "
            f"more than finetune.allow_worse={config.allow_worse:g} below. Lower finetune.matching.lr or raise "
            "finetune.matching.proxy_warmup; --set finetune.allow_worse=1 publishes it nevertheless"
        )
    merge(pipe.transformer, high, low, best)
    save_changed(draft, parent.path, {"transformer": pipe.transformer})
    choice = {"input": float(before.mean()), **{f"merge {ratio:g}": float(passed.mean()) for ratio, passed in found.items()}}
    return finish(draft, sampler, recipe.bench, metrics={"choice": choice, "merge_high": best})


def train_branches(
    pipe: StableDiffusion3Pipeline, teacher: nn.Module, sampler: Sampler, recipe: Recipe, seed: int, work: Path
) -> tuple[nn.Module, nn.Module]:
    """(high, low): copies of the student, each trained on its own nodes with rollouts through both.

    A branch alone is no student: looks (`watch_every`), and so the best round of a branch, are of both merged, in the middle of
    `merge_high`. With `finetune.control` both are one network, trained on all nodes for as many updates as the two branches together.
    """
    from flashgen.models.sample import latent_shape
    from flashgen.stages.report import watcher
    from flashgen.training.matching import Matcher, train_matching
    from flashgen.training.prompts import prompt_pool

    config, nodes, t5_drop = recipe.finetune, sampler.sigmas, recipe.distill.t5_drop
    teacher.requires_grad_(False)
    shape = latent_shape(pipe, sampler.size_px)
    pool = prompt_pool(pipe, config.matching.prompts, seed + 2, sampler.t5_tokens, work, own_prompts(recipe))
    replay = replay_for(config.matching, recipe, pipe, teacher, sampler, seed, work)
    high, low, teacher, proxies = _branches(pipe.transformer, config.lora, teacher, seed)
    above = [i for i, s in enumerate(nodes[:-1]) if s > config.split]
    beneath = [i for i, s in enumerate(nodes[:-1]) if s <= config.split]
    turns = [("high", high, above, config.matching), ("low", low, beneath, config.matching)]
    watch, middle = watcher(pipe, sampler, recipe, work), sorted(config.merge_high)[len(config.merge_high) // 2]

    def merged(name: str, _: nn.Module) -> float | None:
        merge(pipe.transformer, high, low, middle)
        return watch(name, pipe.transformer)

    if config.control:
        longer = config.matching.model_copy(update={"iterations": config.matching.iterations * (2 if beneath else 1)})
        turns, low = [("control", high, above + beneath, longer)], high
    for number, (name, branch, own, matching) in enumerate(turns):
        if own and matching.iterations:  # with two steps the low branch has no node and keeps its weights
            matcher = Matcher(
                name, branch, teacher, pool, nodes, matching, shape, seed + 10 + number, t5_drop=t5_drop, replay=replay,
                proxy=proxies[number], train_nodes=own, net_at=lambda sigma: high if sigma > config.split else low,
            )  # fmt: skip
            train_matching(matcher, work, merged)
    return high, low


def _branches(
    student: nn.Module, lora: LoraTraining | None, teacher: nn.Module, seed: int
) -> tuple[nn.Module, nn.Module, nn.Module, list[nn.Module | None]]:
    """(high, low, teacher, proxies). With `lora` the branches are adapters on the student, the proxies adapters on the teacher."""
    from flashgen.training.roles import roles_on

    if lora is None:
        return copy.deepcopy(student).requires_grad_(True), copy.deepcopy(student).requires_grad_(True), teacher, [None, None]
    _, high, low = roles_on(copy.deepcopy(student), lora, "high", "low", seed=seed)
    teacher, *proxies = roles_on(teacher, lora, "proxy_high", "proxy_low", seed=seed + 1)
    return high, low, teacher, [*proxies]


def _recipe(recipe: Recipe, follows: bool) -> dict[str, object]:
    """The fields that the result depends on, those of other sections too; what is only let through is none of them."""
    own = recipe.finetune.model_dump(exclude={"allow_worse"})
    trajectory = recipe.distill.trajectory.model_dump(include={"teacher_steps", "prompts", "guidance"})
    borrowed: dict[str, object] = {"t5_drop": recipe.distill.t5_drop, "per_task": recipe.bench.per_task}
    return own | borrowed | ({"trajectory": trajectory, "compile": recipe.distill.compile} if follows else {}) | prompts_key(recipe)


def merge(target: nn.Module, high: nn.Module, low: nn.Module, weight_high: float) -> None:
    """target <- low + weight_high (high - low), weight by weight (SD3.5-Flash: 3:7; which side gets 7 is our choice).

    Adapters are merged as the dense weights that they stand for.
    """
    import torch

    from flashgen.training.roles import Role, interpolate

    if isinstance(high, Role) and isinstance(low, Role):
        target.load_state_dict(interpolate(high, low, weight_high))
        return
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
