"""flashgen distill: trajectory guidance, regression on the student's own states, then distribution matching with timestep sharing."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import UsageError
from flashgen.families.configs import configs_in
from flashgen.models.footprint import PROGRAM, Footprint, Parts
from flashgen.recipe.distillation import DistillRecipe
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.checkpoints import describe_student
from flashgen.stages.pictures import SETTINGS, PictureSource, add_pictures, picture_source, real_pictures
from flashgen.stages.planning import Plan
from flashgen.stages.sizes import check_size
from flashgen.stages.tracking import FORWARD_AND_BACKWARD, WITH_CHECKPOINTING, matching_forwards
from flashgen.stages.trainings import (
    Networks,
    adapter_count,
    check_compiler,
    check_matching,
    checkpoint_bytes,
    moment_bytes,
    plain_config,
    rows_together,
)
from flashgen.stages.trajectories import (
    cached_sizes,
    cached_steps,
    guided_teacher,
    on_policy_steps,
    prompt_needs,
    stage_pool,
    student_grid,
)

if TYPE_CHECKING:
    from torch import nn

    from flashgen.models.pipeline import Pipeline
    from flashgen.training.cache import Replay, TrajectorySource
    from flashgen.training.pictures import RealPictures
    from flashgen.training.prompts import PromptPool

UNKEYED: dict[str, Any] = {  # `validate_every` changes nothing in the student; a digest stands for the pictures
    "trajectory": {"validate_every"}, "on_policy": {"validate_every"}, "matching": {"adversarial": SETTINGS},
}  # fmt: skip
MEMORY_ADVICE = (
    "use --recipe sd35-medium-24gb, or --set distill.lora.rank=64 --set distill.lora.base=bfloat16 "
    "--set compute.activation_checkpointing=true, or lower compute.micro_batch and distill.size_px"
)


class Distill(Stage):
    """Teacher to few-step student."""

    name = "distill"
    takes: ClassVar[Takes] = {"teacher": ("teacher",)}
    kind = "student"
    shards = True

    @property
    def config(self) -> DistillRecipe:
        """The stage's section of the recipe."""
        return self.recipe.distill

    @property
    def follows_start(self) -> bool:
        """Whether the student learns the steps of the student `start` instead of the teacher's."""
        return self.config.follow == "start"

    @property
    def taught(self) -> Sampler:
        """The teacher's sampler at the size of the training pictures."""
        return self.sampler.model_copy(update={"size_px": self.config.size_px or self.sampler.size_px})

    @cached_property
    def pictures(self) -> PictureSource | None:
        """Real pictures for the adversarial term. Raises UsageError for pictures that cannot be used."""
        return picture_source(self, self.config.matching, self.taught.size_px)

    def open_more(self) -> None:
        if self.config.start:
            self.inputs["start"] = open_artifact(self.config.start, ("student",))

    def check(self) -> None:
        config = self.config
        if self.follows_start and not config.start:
            raise UsageError("distill.follow=start learns a student's steps; name the student with --set distill.start=STUDENT")
        if not self.follows_start and not config.strides and config.trajectory.teacher_steps % config.steps:
            steps = f"distill.trajectory.teacher_steps={config.trajectory.teacher_steps}"
            raise UsageError(f"{steps} is no multiple of distill.steps={config.steps}; the grids must nest")
        self.require_prompts()
        if (start := self.inputs.get("start")) is not None:
            configs = [plain_config(configs_in(artifact.path)("transformer")) for artifact in (start, self.source)]
            if configs[0] != configs[1]:
                raise UsageError(f"distill.start={config.start}: its transformer is not of the teacher's shape")
            if self.follows_start:
                self._check_followed(start)
        if config.size_px:
            check_size(self.family, configs_in(self.source.path), self.sampler, config.size_px, "distill.size_px=")
        check_matching(self, config.matching, config.batches)
        self.pictures  # noqa: B018  one that cannot be used is an error now
        if config.compile and config.needs_trajectories:
            check_compiler("distill.compile=false")

    def _check_followed(self, start: Artifact) -> None:
        """Raises UsageError for a student that was taught something else, and for steps that its own do not add up to."""
        config, name, sampler = self.config, f"distill.start={self.config.start}", start.manifest.sampler
        assert sampler is not None
        if sampler.encoder != self.taught.encoder:
            raise UsageError(f"{name} runs with other text encoders ({sampler.encoder}) than the teacher; follow its own student")
        if sampler.size_px != self.taught.size_px:
            size = sampler.size_px
            raise UsageError(f"{name} draws {size} px; follow it at its own size with --set distill.size_px={size}")
        if sampler.num_steps <= config.steps:
            raise UsageError(f"{name} has {sampler.num_steps} steps; to be followed in {config.steps} it must have more")
        if sum(config.strides) != sampler.num_steps if config.strides else sampler.num_steps % config.steps:
            strides = f"distill.strides must be {config.steps} numbers whose sum is that, not {config.strides}"
            raise UsageError(f"{name} has {sampler.num_steps} steps; {strides}")

    def settings(self) -> dict[str, Any]:
        choice = self.judge_key() if self.config.matching.validate_every else {}  # the best round depends on it
        precision = {"precision": self.recipe.compute.precision}
        pictures = {"pictures": self.pictures.digest} if self.pictures else {}
        return self.config.model_dump(mode="json", exclude=UNKEYED) | precision | choice | pictures | self.prompts_key()

    def plan(self) -> Plan:
        footprint, config = Footprint(self.source), self.config
        transformer, lora, matching, costs = footprint.transformer, config.lora, config.matching, footprint.family.costs
        one, size = footprint.forward(config.size_px), 2 if (lora.base if lora else self.recipe.compute.precision) == "bfloat16" else 4
        learned = adapter_count(transformer, lora, footprint.family.lora_targets) if lora else footprint.learnable
        checkpointing, per_block = self.recipe.compute.activation_checkpointing, costs.kept_with_adapters if lora else costs.kept
        blocks_kept = per_block + one.blocks if checkpointing else per_block * one.blocks
        states, on_policy, cached, prompts = cached_sizes(
            config, self.taught.shift, self.inputs["start"].manifest.sampler if self.follows_start else None
        )
        prompts += [self.pictures.num_captions] if self.pictures else []
        train = Parts(program=PROGRAM, vae=4.0 * footprint.parts["vae"].count, teacher=float(size * transformer.count))
        tables = 0 if lora else footprint.tables  # each copy of the network has its own
        train |= {"student and fake score": 8.0 * (learned + tables), "gradients": 4.0 * learned}  # one's at a time
        train |= {"optimizers": float(max(moment_bytes(config.trajectory), 2 * moment_bytes(matching)) * learned), "average": 4.0 * learned}
        train |= {"temporaries of a step": 8.0 * learned}  # AdamW's in a regression, over all tensors at once
        train |= {"activations": float(rows_together(self, *config.batches) * one.hidden * blocks_kept * size)}
        learning = WITH_CHECKPOINTING if checkpointing else FORWARD_AND_BACKWARD
        regressed = sum(part.iterations * part.batch for part in (config.trajectory, config.on_policy))
        forwards = cached + matching_forwards(matching, config.steps, learning) * matching.batch + regressed * learning
        text, text_adds = footprint.embedding(sum(prompts))
        transformers = 2 if matching.validate_every and matching.iterations and self.judges else 1  # the best validation's and the last
        stored, encoders = prompt_needs(self, footprint, *prompts)
        train |= encoders
        shared = stored + 2 * states * one.latent
        disk = shared + 2 * on_policy * one.latent + 2 * transformers * transformer.count
        disk += learned * (checkpoint_bytes(config, self.recipe.checkpoint.keep) + (2 if lora else 0))  # the LoRA file
        number = "bf16" if size == 2 else "fp32"
        work = {"bf16": text_adds, number: text_adds * (number == "bf16") + forwards * one.multiply_adds}
        plan = Plan({"embed": text, "train": train}, disk, forwards, work, {"train": MEMORY_ADVICE}, shared)
        add_pictures(plan, footprint, self.pictures)
        plan.add_validation(footprint, self.recipe.bench, self.num_validation_pictures)
        return plan

    def make(self, draft: Draft) -> Result:
        import torch

        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import latent_shape
        from flashgen.models.save import save_changed, save_tensors
        from flashgen.stages.report import Validator
        from flashgen.training.lora import save_lora
        from flashgen.training.regression import regress
        from flashgen.training.roles import Role
        from flashgen.training.shards import gathered_network

        config, source, work = self.config, self.source.path, draft.work
        text = load_pipeline(source, weights="text", device=self.device)  # alone: no transformer is in memory while prompts are encoded
        pictures = real_pictures(self, self.pictures, config.matching, self.taught, text, draft.cache) if self.pictures else None
        pools = self._pools(text, draft.cache)
        del text
        pipe = load_pipeline(source, getattr(torch, config.lora.base) if config.lora else torch.float32, "training", self.device)
        teacher, student, fake_score = self._networks(pipe)
        micro_batch, checkpoint = self.recipe.compute.micro_batch, self.recipe.checkpoint
        shape = latent_shape(pipe, self.taught.size_px)
        steps_of = self._trajectory_source(teacher)
        nodes = student_grid(config, steps_of.sigmas)
        sampler = Sampler(**{**self.taught.model_dump(), "sigmas": nodes, "guidance": 1.0, "trained_steps": [config.steps], "scales": None})
        describe_student(work, self.source, sampler, config.lora)
        validate = Validator(self, pipe, sampler, work)
        pool, followed = pools.get("trajectory"), self.inputs["start"] if self.follows_start else self.source
        replay = cached_steps(self, pool, steps_of, nodes, shape, draft.cache, followed) if pool else None
        if replay and config.trajectory.iterations:
            regress(
                student, replay, nodes, config.trajectory, self.seed, work, checkpoint, "trajectory", config.compile, validate, micro_batch
            )
        if replay and pool and config.on_policy.iterations:
            replay = replay.extended(on_policy_steps(self, pool, steps_of, nodes, shape, work, student))
            regress(
                student, replay, nodes, config.on_policy, self.seed, work, checkpoint, "on_policy", config.compile, validate, micro_batch
            )
        del steps_of  # one more network where it is a student
        metrics = {}
        if config.matching.iterations:
            metrics = self._match(draft, pools["matching"], (teacher, student, fake_score), nodes, shape, replay, pictures, validate)
        if isinstance(student, Role):
            save_tensors(draft.path / "transformer", source / "transformer", student.merged)
            save_lora(draft.path / "lora", student, self.family.lora_prefix, nodes, self.source.manifest.digest)
            save_changed(draft, source, self.family, {}, kept=("transformer",))
        else:
            save_changed(draft, source, self.family, {"transformer": gathered_network(student, self.family)})
        return Result(sampler, {"validated": metrics} if metrics else {})

    def _pools(self, pipe: Pipeline, cache: Path) -> dict[str, PromptPool]:
        """Encoded prompts of the trainings that the recipe asks for, by name; each prompt is encoded once and mapped from `cache`."""
        config = self.config
        counts = {"matching": (config.matching.prompts if config.matching.iterations else 0, self.seed + 1)}
        counts["trajectory"] = (config.trajectory.prompts if config.needs_trajectories else 0, self.seed)
        return {name: stage_pool(self, count, seed, pipe, self.taught, cache) for name, (count, seed) in counts.items() if count}

    def _networks(self, pipe: Pipeline) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        """(teacher, student, fake score), all as the teacher at first, unless the student starts from another."""
        networks, teacher = Networks.of(self), pipe.transformer
        if lora := self.config.lora:
            roles = networks.roles(teacher, lora, "student", "fake_score", seed=self.seed)
            return roles[0], roles[1], roles[2]
        student = networks.learning(self._start() if "start" in self.inputs else copy.deepcopy(teacher))
        fake_score = networks.learning(copy.deepcopy(teacher)) if self.config.matching.iterations else None
        return networks.frozen(teacher), student, fake_score

    def _start(self) -> nn.Module:
        """The transformer of the student `start`, read anew."""
        from flashgen.models.pipeline import load_pipeline

        transformer: nn.Module = load_pipeline(self.inputs["start"].path, weights="transformer", device=self.device).transformer
        return transformer

    def _trajectory_source(self, teacher: nn.Module) -> TrajectorySource:
        """Whose steps the student learns."""
        from flashgen.training.cache import TrajectorySource

        if self.follows_start:
            sampler = self.inputs["start"].manifest.sampler
            assert sampler is not None
            return TrajectorySource(Networks.of(self).frozen(self._start()), sampler.sigmas)
        return guided_teacher(teacher, self.taught.shift, self.recipe)

    def _match(
        self,
        draft: Draft,
        pool: PromptPool,
        networks: tuple[nn.Module, nn.Module, nn.Module | None],
        nodes: list[float],
        shape: tuple[int, ...],
        replay: Replay | None,
        pictures: RealPictures | None,
        validate: Any,
    ) -> dict[str, float]:
        """Distribution matching. Where validations choose, the weights of the last round are written to `last/` too."""
        from flashgen.models.save import save_tensors
        from flashgen.training.matching import Matcher, Roles, Task, train_matching
        from flashgen.training.roles import Role
        from flashgen.training.shards import gathered_network

        teacher, student, fake_score = networks
        micro_batch, drop, shift = self.recipe.compute.micro_batch, self.config.encoder_drop, self.taught.shift
        task = Task("matching", pool, nodes, shape, self.seed, drop, replay, micro_batch=micro_batch, shift=shift, pictures=pictures)
        matcher = Matcher(task, Roles(student, teacher, fake_score), self.config.matching, self.family)

        def keep_last() -> None:
            matcher.release()  # optimizer states are saved; writing needs memory of its own
            value = student.merged if isinstance(student, Role) else gathered_network(student, self.family).state_dict().__getitem__
            save_tensors(draft.path / "last", self.source.path / "transformer", value)

        return train_matching(matcher, draft.work, self.recipe.checkpoint, validate, keep_last)
