"""flashgen distill: trajectory guidance, regression on the student's own states, then distribution matching with timestep sharing."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import UsageError
from flashgen.families.configs import configs_in
from flashgen.pixels import Size
from flashgen.recipe.distillation import DistillRecipe
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.checkpoints import describe_student
from flashgen.stages.judging import judge_key
from flashgen.stages.pictures import SETTINGS, PictureSource, picture_source, real_pictures
from flashgen.stages.planning import Plan
from flashgen.stages.sizes import check_size
from flashgen.stages.trainings import (
    Networks,
    check_compiler,
    check_matching,
    check_optimizer,
    compute_key,
    plain_config,
)
from flashgen.stages.trajectories import (
    cached_steps,
    guided_teacher,
    on_policy_steps,
    stage_pool,
    student_grid,
)

if TYPE_CHECKING:
    from torch import nn

    from flashgen.models.pipeline import Pipeline
    from flashgen.training.cache import TrajectorySource
    from flashgen.training.matching import Bucket
    from flashgen.training.prompts import PromptPool

UNKEYED: dict[str, Any] = {  # `validate_every` changes nothing in the student; a digest stands for the pictures
    "trajectory": {"validate_every"}, "on_policy": {"validate_every"}, "matching": {"adversarial": SETTINGS},
}  # fmt: skip


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
        """The teacher's sampler at the size of the training pictures, the first one of several."""
        return self.sampler.model_copy(update={"size_px": self.sizes[0]})

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the training pictures."""
        return [size or self.sampler.size_px for size in self.config.all_sizes]

    @cached_property
    def pictures(self) -> PictureSource | None:
        """Real pictures for the adversarial term. Raises UsageError for pictures that cannot be used."""
        return picture_source(self, self.config.matching, self.sizes)

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
            configs = [plain_config(configs_in(artifact.path, self.family)("transformer")) for artifact in (start, self.source)]
            if configs[0] != configs[1]:
                raise UsageError(f"distill.start={config.start}: its transformer is not of the teacher's shape")
            if self.follows_start:
                self._check_followed(start)
        if config.size_px:
            check_size(self.family, configs_in(self.source.path, self.family), self.sampler, config.size_px, "distill.size_px=")
        for size in config.sizes:
            check_size(self.family, configs_in(self.source.path, self.family), self.sampler, size, "distill.sizes=")
        check_matching(self, config.matching, config.batches)
        self.pictures  # noqa: B018  one that cannot be used is an error now
        check_optimizer(self)
        if config.compile:
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
        choice = judge_key(self) if self.config.matching.validate_every else {}  # the best round depends on it
        pictures = {"pictures": self.pictures.digest} if self.pictures else {}
        unkeyed = UNKEYED if self.config.sizes else UNKEYED | {"sizes": True}  # students from before there were sizes stay up to date
        return self.config.model_dump(mode="json", exclude=unkeyed) | compute_key(self) | choice | pictures | self.prompts_key()

    def plan_with(self, micro_batch: int) -> Plan:
        from flashgen.stages.distill_plan import plan

        return plan(self, micro_batch)

    def make(self, draft: Draft) -> Result:
        import torch

        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import latent_shape
        from flashgen.models.save import save_changed, save_tensors
        from flashgen.stages.report import Validator
        from flashgen.training.lora import save_lora
        from flashgen.training.matching import Bucket
        from flashgen.training.regression import regress
        from flashgen.training.roles import Role
        from flashgen.training.shards import gathered_network

        config, source, work = self.config, self.source.path, draft.work
        text = load_pipeline(source, weights="text", device=self.device)  # alone: no transformer is in memory while prompts are encoded
        pictures = real_pictures(self, self.pictures, config.matching, self.taught, text, draft.cache) if self.pictures else []
        pools = self._pools(text, draft.cache)
        del text
        pipe = load_pipeline(source, getattr(torch, config.lora.base) if config.lora else torch.float32, "training", self.device)
        teacher, student, fake_score = self._networks(pipe)
        micro_batch, checkpoint, optimizer_bits = self.micro_batch, self.recipe.checkpoint, self.recipe.compute.optimizer_bits
        shapes = [latent_shape(pipe, size) for size in self.sizes]
        steps_of = self._trajectory_source(teacher)
        nodes = student_grid(config, steps_of.sigmas)
        sampler = Sampler(**{**self.taught.model_dump(), "sigmas": nodes, "guidance": 1.0, "trained_steps": [config.steps], "scales": None})
        describe_student(work, self.source, sampler, config.lora)
        validate = Validator(self, pipe, sampler, work)
        pool, followed = pools.get("trajectory"), self.inputs["start"] if self.follows_start else self.source
        parts = list(zip(pool.shared_out(len(shapes)), shapes, strict=True)) if pool else []
        replays = [cached_steps(self, part, steps_of, nodes, shape, draft.cache, followed) for part, shape in parts]
        if replays and config.trajectory.iterations:
            regress(
                student, replays[0], nodes, config.trajectory, self.seed, work, checkpoint, "trajectory", validate,
                micro_batch, replays[1:], optimizer_bits,
            )  # fmt: skip
        if replays and config.on_policy.iterations:
            visited = [on_policy_steps(self, part, steps_of, nodes, shape, work, student) for part, shape in parts]
            replays = [replay.extended(other) for replay, other in zip(replays, visited, strict=True)]
            regress(
                student, replays[0], nodes, config.on_policy, self.seed, work, checkpoint, "on_policy", validate,
                micro_batch, replays[1:], optimizer_bits,
            )  # fmt: skip
        del steps_of  # one more network where it is a student
        metrics = {}
        if config.matching.iterations:
            buckets = [Bucket(*of_one_size) for of_one_size in zip_longest(shapes, replays, pictures)]
            metrics = self._match(draft, pools["matching"], (teacher, student, fake_score), nodes, buckets, validate)
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
        networks, teacher = Networks.of(self, self.config.compile), pipe.transformer
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
            return TrajectorySource(Networks.of(self, self.config.compile).frozen(self._start()), sampler.sigmas)
        return guided_teacher(teacher, self.taught.shift, self.recipe)

    def _match(
        self,
        draft: Draft,
        pool: PromptPool,
        networks: tuple[nn.Module, nn.Module, nn.Module | None],
        nodes: list[float],
        buckets: list[Bucket],
        validate: Any,
    ) -> dict[str, float]:
        """Distribution matching. Where validations choose, the weights of the last round are written to `last/` too."""
        from flashgen.models.save import save_tensors
        from flashgen.training.matching import Matcher, Roles, Task, train_matching
        from flashgen.training.roles import Role
        from flashgen.training.shards import gathered_network

        (teacher, student, fake_score), (first, *others) = networks, buckets
        task = Task(
            "matching", pool, nodes, first.shape, self.seed, self.config.encoder_drop, first.replay,
            micro_batch=self.micro_batch, shift=self.taught.shift, pictures=first.pictures, others=others,
            optimizer_bits=self.recipe.compute.optimizer_bits,
        )  # fmt: skip
        matcher = Matcher(task, Roles(student, teacher, fake_score), self.config.matching, self.family)

        def keep_last() -> None:
            matcher.release()  # optimizer states are saved; writing needs memory of its own
            value = student.merged if isinstance(student, Role) else gathered_network(student, self.family).state_dict().__getitem__
            save_tensors(draft.path / "last", self.source.path / "transformer", value)

        return train_matching(matcher, draft.work, self.recipe.checkpoint, validate, keep_last)
