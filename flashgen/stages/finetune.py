"""flashgen finetune: one branch for high noise, one for low noise, merged into a single checkpoint (split-timestep)."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.errors import NumericsError, UsageError
from flashgen.flow.grid import check_nested, shifted_grid
from flashgen.models.footprint import Footprint, Parts
from flashgen.progress import say
from flashgen.recipe.distillation import FinetuneRecipe, MatchingTraining
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.inputs import teacher_of
from flashgen.stages.judging import judge_key
from flashgen.stages.needs import Held, has_heads, passing
from flashgen.stages.pictures import SETTINGS, PictureSource, add_pictures, picture_source, real_pictures
from flashgen.stages.planning import Plan
from flashgen.stages.tracking import learning_cost, matching_forwards
from flashgen.stages.trainings import (
    Networks,
    adapter_count,
    check_compiler,
    check_matching,
    check_optimizer,
    compute_key,
    guided_forwards,
    matching_state,
    moment_bytes,
)
from flashgen.stages.trajectories import cached_steps, embedding_room, guided_teacher, prompt_needs, stage_pool

if TYPE_CHECKING:
    from torch import nn

    from flashgen.families.base import Forward
    from flashgen.models.pipeline import Pipeline
    from flashgen.training.cache import Replay
    from flashgen.training.prompts import PromptPool


class Finetune(Stage):
    """Student to fine-tuned student."""

    name = "finetune"
    takes: ClassVar[Takes] = {"student": ("student",)}
    kind = "student"
    shards = True

    @property
    def config(self) -> FinetuneRecipe:
        """The stage's section of the recipe."""
        return self.recipe.finetune

    @property
    def follows_teacher(self) -> bool:
        """Whether a term of the matching needs the teacher's trajectories. Raises UsageError for weights that do not fit the steps."""
        try:
            return self.config.matching.needs_trajectories(self.sampler.num_steps)
        except ValueError as error:
            raise UsageError(f"finetune.matching: {error}") from error

    @cached_property
    def pictures(self) -> PictureSource | None:
        """Real pictures for the adversarial term. Raises UsageError for pictures that cannot be used."""
        return picture_source(self, self.config.matching, [self.sampler.size_px])

    @property
    def chooses(self) -> bool:
        """Whether the merge ratio is chosen by score."""
        return self.judges or len(self.config.merge_high) > 1

    def open_more(self) -> None:
        self.inputs["teacher"] = teacher_of(self.source)

    def check(self) -> None:
        config, sampler = self.config, self.sampler
        self.require_prompts()
        check_matching(self, config.matching, [config.matching.batch] if config.matching.iterations else [])
        self.pictures  # noqa: B018  one that cannot be used is an error now
        if self.follows_teacher:
            check_nested(sampler.sigmas, shifted_grid(self.recipe.distill.trajectory.teacher_steps, sampler.shift))
        check_optimizer(self)
        if self.recipe.distill.compile:
            check_compiler("distill.compile=false")
        if self.chooses and not self.judges:
            why = "bench.per_task=0 draws nothing" if self.judge else f"{self.source.path} belongs to no world with a judge"
            raise UsageError(
                f"finetune.merge_high={config.merge_high} leaves a choice, and {why}; give one, as in --set finetune.merge_high=[0.7] "
                "(the paper's), or a judge, as in --judge clip:hf:openai/clip-vit-base-patch16, with --set bench.per_task=1 or more"
            )
        if config.lora and config.lora.base != "float32":
            raise UsageError("finetune merges dense networks in float32; leave finetune.lora.base out")
        if config.lora and config.matching.ida < 1:
            raise UsageError("finetune.lora with matching.ida < 1 would mix adapters of different networks; leave one of them out")

    def settings(self) -> dict[str, Any]:
        borrowed: dict[str, Any] = {"encoder_drop": self.recipe.distill.encoder_drop} | compute_key(self) | judge_key(self)
        if self.follows_teacher:
            used = {"teacher_steps", "prompts", "guidance", "guidance_interval", "skip_layers"}
            trajectory = self.recipe.distill.trajectory.model_dump(include=used, exclude_none=True)
            borrowed |= {"trajectory": trajectory, "compile": self.recipe.distill.compile}
        if self.pictures:
            borrowed |= {"pictures": self.pictures.digest}
        unkeyed: dict[str, Any] = {"allow_worse": True, "matching": {"adversarial": SETTINGS}}
        return self.config.model_dump(mode="json", exclude=unkeyed) | borrowed | self.prompts_key()

    def plan_with(self, micro_batch: int) -> Plan:
        footprint, matching, one = Footprint(self.source), self.config.matching, Footprint(self.source).forward()
        held, steps, rows = self._held(footprint, one), self.sampler.num_steps, passing(self, micro_batch, matching.batch)
        forwards = round(2 * matching_forwards(matching, steps, learning_cost(self)) * matching.batch)
        prompts, states = [matching.prompts], 0
        memory: dict[str, Parts] = {}
        if self.follows_teacher:
            trajectory = self.recipe.distill.trajectory
            prompts.append(trajectory.prompts)
            forwards += guided_forwards(trajectory, self.sampler.shift) * trajectory.prompts
            states = (steps + 1) * trajectory.prompts
            memory["trajectories"] = held.sampling(micro_batch, steps + 1, trajectory.guidance != 1)
        if self.pictures:
            prompts.append(self.pictures.num_captions)
        text, text_adds = footprint.embedding(sum(prompts), embedding_room(self))
        stored, encoders = prompt_needs(self, footprint, *prompts)
        memory |= {"embed": text | {"student": 4.0 * footprint.transformer.count}, "train": held.training(rows) | encoders}
        shared = stored + 2 * states * one.latent
        disk = shared + 2 * footprint.transformer.count
        state = matching_state(matching, self.recipe.compute.optimizer_bits)
        disk += (2 * self.recipe.checkpoint.keep + 1) * state * held.learned  # per branch, and one that is being written
        number = "bf16" if held.bytes_each == 2 else "fp32"
        work = {"bf16": text_adds, number: text_adds * (number == "bf16") + forwards * one.multiply_adds}
        advice = "use --set compute.activation_checkpointing=true and a lower compute.micro_batch, or --set finetune.lora.rank=64"
        plan = Plan(memory, disk, forwards, work, {"train": advice, "trajectories": advice}, shared, self.machine, rows)
        add_pictures(plan, footprint, self.pictures)
        plan.add_validation(footprint, self.recipe.bench, self.num_validation_pictures)
        return plan

    def _held(self, footprint: Footprint, one: Forward) -> Held:
        """Networks of a branch's training: the student, both branches, the teacher and one dense fake score, or all adapters."""
        config, matching, count = self.config, self.config.matching, footprint.transformer.count
        learned = adapter_count(footprint.transformer, config.lora, footprint.family.lora_targets) if config.lora else footprint.learnable
        moments = 2 * moment_bytes(matching, self.recipe.compute.optimizer_bits)
        size, students = 2 if self.recipe.compute.precision == "bfloat16" else 4, 2 if config.lora else 1
        return Held(
            self, footprint, one, float((size + 4 * students) * count), 4 if config.lora else 3, learned, moments,
            config.lora is not None, size, self.sampler.num_steps, matching.batch, has_heads(matching, self.sampler.num_steps),
            matching.validate_every > 0, ("student and teacher", "branches and fake scores"), 4.0 * count,
        )  # fmt: skip

    def make(self, draft: Draft) -> Result:
        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.save import save_changed
        from flashgen.stages.report import CHOICE_SEED, grid_prompts, judge

        config, sampler = self.config, self.sampler
        pipe = load_pipeline(self.source.path, weights="training", device=self.device)
        before = judge(self, pipe, sampler).mean if self.judges else None
        high, low = self._train_branches(pipe, draft)
        ratios = config.merge_high if high is not low else [1.0]
        if before is None or self.judge is None:
            merge(pipe.transformer, high, low, ratios[0])
            save_changed(draft, self.source.path, self.family, {"transformer": pipe.transformer})
            return Result(sampler, {"choice": "not judged", "merge_high": ratios[0]})
        metric, better, count, scores = self.judge.metric, self.judge.better, len(grid_prompts(self, CHOICE_SEED)), {}
        for ratio in ratios:
            merge(pipe.transformer, high, low, ratio)
            scores[ratio] = judge(self, pipe, sampler).mean
            say(f"merged {ratio:g} high : {1 - ratio:g} low: {metric} {scores[ratio]:.3f} on {count} choice prompts")
        best = max(scores, key=lambda ratio: better(scores[ratio]))
        say(f"input {before:.3f}, best merge {best:g}: {scores[best]:.3f}")
        if better(before) - better(scores[best]) > config.allow_worse:
            raise NumericsError(
                f"fine-tuning made the student worse: {metric} {before:.3f} -> {scores[best]:.3f} on {count} prompts, "
                f"more than finetune.allow_worse={config.allow_worse:g} below. Lower finetune.matching.lr or raise "
                "finetune.matching.fake_score_warmup; --set finetune.allow_worse=1 publishes it nevertheless"
            )
        merge(pipe.transformer, high, low, best)
        save_changed(draft, self.source.path, self.family, {"transformer": pipe.transformer})
        choice = {"input": before, **{f"merge {ratio:g}": value for ratio, value in scores.items()}}
        return Result(sampler, {"choice": choice, "merge_high": best})

    def _train_branches(self, pipe: Pipeline, draft: Draft) -> tuple[nn.Module, nn.Module]:
        """(high, low): copies of the student, each trained on its own nodes with rollouts through both.

        A branch alone is no student, so validations, and thus the best round of a branch, are of both merged, in the middle of
        `merge_high`. With `finetune.control` both are one network, trained on all nodes for as many updates as the two together.
        """
        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import latent_shape
        from flashgen.stages.report import Validator
        from flashgen.training.matching import Matcher, Roles, Task, train_matching

        config, sampler, nodes, work = self.config, self.sampler, self.sampler.sigmas, draft.work
        networks, text = Networks.of(self, self.recipe.distill.compile), load_pipeline(self.source.path, weights="text", device=self.device)
        pictures = real_pictures(self, self.pictures, config.matching, sampler, text, draft.cache)[0] if self.pictures else None
        pool = stage_pool(self, config.matching.prompts, self.seed + 2, text, sampler, draft.cache)
        trajectories = self.recipe.distill.trajectory
        steps_pool = stage_pool(self, trajectories.prompts, self.seed, text, sampler, draft.cache) if self.follows_teacher else None
        shape = latent_shape(pipe, sampler.size_px)
        del text  # its memory is for the training
        high, low, teacher, fake_scores = self._branches(networks, pipe.transformer)
        replay = self._replay(steps_pool, teacher, shape, draft.cache) if steps_pool else None
        validator, middle = Validator(self, pipe, sampler, work), sorted(config.merge_high)[len(config.merge_high) // 2]

        def validate(name: str, _: nn.Module) -> float | None:
            merge(pipe.transformer, high, low, middle)
            return validator(name, pipe.transformer)

        if config.control:
            low = high
        for number, (name, branch, train_nodes, matching) in enumerate(self._turns(high, low)):
            if train_nodes and matching.iterations:  # with two steps the low branch has no node and keeps its weights
                task = Task(
                    name, pool, nodes, shape, self.seed + 10 + number, self.recipe.distill.encoder_drop, replay, train_nodes,
                    lambda sigma: high if sigma > config.split else low, self.micro_batch, sampler.shift, pictures,
                    optimizer_bits=self.recipe.compute.optimizer_bits,
                )  # fmt: skip
                fake_score = fake_scores[number] if config.lora else networks.learning(self._teacher())
                matcher = Matcher(task, Roles(branch, teacher, fake_score), matching, self.family)
                train_matching(matcher, work, self.recipe.checkpoint, validate)
        return high, low

    def _teacher(self) -> nn.Module:
        """The teacher's transformer in float32, read anew."""
        from flashgen.models.pipeline import load_pipeline

        transformer: nn.Module = load_pipeline(self.inputs["teacher"].path, weights="transformer", device=self.device).transformer
        return transformer

    def _turns(self, high: nn.Module, low: nn.Module) -> list[tuple[str, nn.Module, list[int], MatchingTraining]]:
        """(name, branch, its nodes, settings) of each training, in order."""
        config, nodes = self.config, self.sampler.sigmas[:-1]
        above = [i for i, sigma in enumerate(nodes) if sigma > config.split]
        below = [i for i, sigma in enumerate(nodes) if sigma <= config.split]
        if config.control:
            longer = config.matching.model_copy(update={"iterations": config.matching.iterations * (2 if below else 1)})
            return [("control", high, above + below, longer)]
        return [("high", high, above, config.matching), ("low", low, below, config.matching)]

    def _replay(self, pool: PromptPool, teacher: nn.Module, shape: tuple[int, ...], cache: Path) -> Replay:
        """The teacher's cached trajectories over the student's nodes, of the prompts in `pool`."""
        steps_of = guided_teacher(teacher, self.sampler.shift, self.recipe)
        return cached_steps(self, pool, steps_of, self.sampler.sigmas, shape, cache, self.inputs["teacher"])

    def _branches(self, networks: Networks, student: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, list[nn.Module]]:
        """(high, low, teacher, fake scores). With adapters, branches are adapters on the student, fake scores adapters on the teacher."""
        lora = self.config.lora
        if lora is None:
            high, low = (networks.learning(copy.deepcopy(student)) for _ in range(2))
            return high, low, networks.frozen(self._teacher()), []
        _, high, low = networks.roles(copy.deepcopy(student), lora, "high", "low", seed=self.seed)
        backbone = self._teacher().to(networks.dtype)
        teacher, *fake_scores = networks.roles(backbone, lora, "fake_score_high", "fake_score_low", seed=self.seed + 1)
        return high, low, teacher, [*fake_scores]


def merge(target: nn.Module, high: nn.Module, low: nn.Module, weight_high: float) -> None:
    """target <- low + weight_high (high - low), weight by weight (SD3.5-Flash: 3:7; which side gets 7 is our choice).

    Adapters are merged as the dense weights that they stand for.
    """
    import torch

    from flashgen.training.roles import Role, interpolate
    from flashgen.training.shards import full

    if isinstance(high, Role) and isinstance(low, Role):
        target.load_state_dict(interpolate(high, low, weight_high))
        return
    with torch.no_grad():
        for into, h, lo in zip(target.parameters(), high.parameters(), low.parameters(), strict=True):
            into.copy_(full(torch.lerp(lo, h, weight_high)))
