"""Recipe sections of `distill` and `finetune`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from flashgen.pixels import Size, SizePx
from flashgen.recipe.base import Beta, Model, Training


def by_step(name: str, given: list[float], steps: int) -> list[float]:
    """One weight per student step; ValueError when `given` is neither one for all of them nor one for each."""
    if len(given) not in (1, steps) or min(given) < 0:
        raise ValueError(f"{name} must hold one weight >= 0 for all steps or one for each of the {steps}, not {given}")
    return given * steps if len(given) == 1 else given


def _from_low_to_high(levels: list[float]) -> list[float]:
    if not 0 <= levels[0] < levels[1] <= 1:
        raise ValueError(f"must be two noise levels in 0..1, the lower first, not {levels}")
    return levels


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression as Python reads it: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
SigmaInterval = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_from_low_to_high)]


class SkipLayers(Model):
    """Skip-layer guidance, in addition to classifier-free guidance: + scale (v_c - v_skip), v_skip without some of the teacher's blocks."""

    blocks: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="blocks that are left out; SD3.5-Medium: [7, 8, 9]")
    scale: float = Field(2.8, gt=0)
    start: float = Field(0.01, ge=0, le=1, description="share of a trajectory's steps behind which it begins")
    stop: float = Field(0.2, ge=0, le=1, description="share of a trajectory's steps before which it ends")

    @model_validator(mode="after")
    def _start_before_stop(self) -> SkipLayers:
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} must be below stop={self.stop}")
        return self


class Regression(Training):
    """Settings for regressing the student onto cached steps of the teacher, or of an earlier student."""

    iterations: int = Field(0, ge=0, description="0 leaves it out")
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices inside blocks; 0 leaves them to AdamW")
    huber: float = Field(0.0, ge=0, description="c of the pseudo-Huber loss of a sample's velocity; 0 is the squared error")
    node_draws: list[float] = Field([1], description="how often each student step is drawn, relative to the others")
    ema: float = Field(0.99, ge=0, lt=1)
    validate_every: int = Field(0, ge=0, description="updates between validations on held-out prompts; 0: never")


class TrajectoryTraining(Regression):
    """Stage 1: trajectory guidance."""

    iterations: int = Field(1500, ge=0)
    teacher_steps: int = Field(
        32, ge=2, le=1000, description="a multiple of the student's steps, or the sum of `strides`, so that the grids nest"
    )
    prompts: int = Field(2048, ge=1, description="trajectories in the cache, one prompt and noise each")
    guidance: float = Field(4.5, ge=1, description="of the teacher: v_u + guidance (v_c - v_u)")
    guidance_interval: SigmaInterval | None = Field(None, description="noise levels between which the teacher is guided; null: all")
    skip_layers: SkipLayers | None = Field(None, description="skip-layer guidance of the teacher; null: none")


class OnPolicyTraining(Regression):
    """Regression from the student's own states, in addition to the cached trajectories (DAgger)."""

    prompts: int = Field(2048, ge=1, description="the first so many of `trajectory.prompts`, with other noise")


class AdversarialTraining(Model):
    """Discriminator heads on the fake score's features; `node_adversarial` weighs their term."""

    pictures: Path | None = Field(
        None, description="real pictures: a folder, .tar, .parquet, or .safetensors of latents; null: the ends of trajectories"
    )
    picture_column: str = Field("image", min_length=1, description="column of a .parquet file with the bytes of pictures")
    caption_column: str | None = Field("caption", description="column of captions in .parquet and metadata.jsonl; null: no captions there")
    blocks: list[int] = Field([], description="transformer blocks whose image tokens are judged; none: the middle one and the last")
    lr: float = Field(1e-4, gt=0)
    channels: int = Field(64, ge=4, multiple_of=4, description="of each head's convolution")
    refresh: float = Field(0.005, ge=0, le=1, description="probability per step that a head is initialised again")
    band: list[float] = Field([0.05, 0.2], min_length=2, max_length=2, description="size of its direction over the matching one")

    @field_validator("band")
    @classmethod
    def _from_low_to_high(cls, band: list[float]) -> list[float]:
        if not 0 <= band[0] <= band[1]:
            raise ValueError(f"must be two sizes, the lower first and not below 0, not {band}")
        return band


class MatchingTraining(Training):
    """Stage 2: distribution matching. The defaults are SD3.5-Flash's timestep sharing.

    A `node_*` list holds one weight for all student steps, or one per step.
    """

    point: Literal["shared", "renoise", "interval"] = Field("shared", description="where scores are compared")
    last: Literal["interp", "renoise"] = Field("renoise", description="how `shared` gets to a noise level on its last step")
    min_sigma: float = Field(0.02, gt=0, lt=1, description="scores are not compared below this noise level (DMD2)")
    max_sigma: float = Field(0.98, gt=0, lt=1, description="nor above this one")
    augmentation: Literal["tied", "decoupled"] = Field("tied", description="guidance at that point, or at one of its own below the node")
    fake_score_target: Literal["rollout", "step", "interval"] = Field("rollout", description="what the fake score is fitted on")
    ida: float = Field(1.0, gt=0, le=1, description="after each update: fake score <- ida * fake score + (1 - ida) * student (SenseFlow)")
    node_matching: list[float] = Field([1.0], description="weight of the matching term")
    node_augmentation: list[float] = Field([1.0], description="weight of the guidance term")
    node_adversarial: list[float] = Field([0.0], description="weight of the adversarial term")
    node_trajectory: list[float] = Field([0.0], description="weight of trajectory guidance")
    adversarial: AdversarialTraining = AdversarialTraining()

    prompts: int = Field(4096, ge=1)
    iterations: int = Field(300, ge=0)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-4, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices inside blocks; 0 leaves them to AdamW")
    decay_share: float = Field(0.0, ge=0, le=1, description="share of the updates over which the student's rates fall, linearly")
    fake_score_lr: float = Field(2e-4, gt=0)
    fake_score_muon_lr: float = Field(0.0, ge=0, description="as `muon_lr`, for the fake score")
    fake_score_updates: int = Field(2, ge=1, description="fake score updates per student update")
    fake_score_warmup: int = Field(0, ge=0, description="first rounds that fit the fake score alone, which at first equals the teacher")
    guidance: float = Field(4.5, ge=1, description="of the teacher's score; the fake score is never guided")
    guidance_interval: SigmaInterval | None = Field(None, description="noise levels between which the teacher's score is guided; null: all")
    skip_layers: SkipLayers | None = Field(None, description="skip-layer guidance of the teacher's score; null: none")
    floor: float = Field(0.1, gt=0, description="of the per-sample normaliser")
    ema: float = Field(0.99, ge=0, lt=1)
    betas: tuple[Beta, Beta] = Field((0.0, 0.99), description="AdamW's; no momentum, since the target moves with the student (DMD2)")
    warmup: int = Field(1, ge=1)
    validate_every: int = Field(0, ge=0, description="rounds between validations; the student keeps the best one's weights; 0: never")

    def node_weights(self, steps: int) -> dict[str, list[float]]:
        """One weight per student step of each term; ValueError when a list fits neither all steps nor each."""
        terms = ("matching", "augmentation", "adversarial", "trajectory")
        return {term: by_step(f"node_{term}", getattr(self, f"node_{term}"), steps) for term in terms}

    def needs_trajectories(self, steps: int) -> bool:
        """Return True if a term needs cached trajectories: trajectory guidance, or an adversary without real pictures."""
        weights = self.node_weights(steps)
        needed = weights["trajectory"] + (weights["adversarial"] if self.adversarial.pictures is None else [])
        return self.iterations > 0 and any(needed)

    @property
    def needs_pictures(self) -> bool:
        """Return True if the adversarial term needs the real pictures of `adversarial.pictures`."""
        return self.iterations > 0 and any(self.node_adversarial) and self.adversarial.pictures is not None


class LoraTraining(Model):
    """Teacher, student and fake score as adapters on one frozen backbone: memory for one network and two small sets of matrices."""

    rank: int = Field(64, ge=1)
    alpha: int = Field(0, ge=0, description="the update is alpha / rank B A; 0: alpha = rank")
    targets: Pattern | None = Field(None, description="regular expression of the modules that get an adapter; null: the family's")
    base: Literal["float32", "bfloat16"] = Field("float32", description="type of the frozen weights; adapters stay in float32")


class DistillRecipe(Model):
    """`distill`: trajectory guidance, on-policy regression, then distribution matching."""

    steps: int = Field(4, ge=1, le=16, description="student steps")
    size_px: SizePx | None = Field(None, description="of the training pictures: 512, or WIDTHxHEIGHT; null: the teacher's")
    sizes: list[SizePx] = Field([], description="several sizes instead of one: each batch has a random one of them; none: `size_px`")
    strides: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="steps of the teacher (or of `start`) that each student step covers; none: as many each"
    )
    start: str | None = Field(None, description="student that training starts from, of any number of steps; null: the teacher")
    follow: Literal["teacher", "start"] = Field("teacher", description="whose steps are learned: the guided teacher's, or those of `start`")
    encoder_drop: float = Field(
        0.25, ge=0, le=1, description="share of samples without the family's droppable text encoder (SD3: T5), so that it can be removed"
    )
    lora: LoraTraining | None = Field(None, description="adapters on one backbone instead of three networks")
    compile: bool = Field(False, description="torch.compile the blocks of teacher, student and fake score; needs a C++ compiler")
    trajectory: TrajectoryTraining = TrajectoryTraining()
    on_policy: OnPolicyTraining = OnPolicyTraining()
    matching: MatchingTraining = MatchingTraining()

    @property
    def all_sizes(self) -> Sequence[Size | None]:
        """Sizes of the training pictures; None is the teacher's size."""
        return self.sizes or [self.size_px]

    @property
    def batches(self) -> list[int]:
        """Batch sizes of the trainings that are not left out."""
        return [part.batch for part in (self.trajectory, self.on_policy, self.matching) if part.iterations]

    @property
    def needs_trajectories(self) -> bool:
        """Return True if any training uses cached trajectories."""
        return self.trajectory.iterations + self.on_policy.iterations > 0 or self.matching.needs_trajectories(self.steps)

    @model_validator(mode="after")
    def _fits_together(self) -> DistillRecipe:
        self.matching.node_weights(self.steps)
        for part in (self.trajectory, self.on_policy):
            if not any(by_step("node_draws", part.node_draws, self.steps)):
                raise ValueError("node_draws draws no step at all; give one a number above 0")
        teacher_steps = self.trajectory.teacher_steps
        of_student = self.follow == "start"  # its number of steps is known when it is opened
        if self.strides and (len(self.strides) != self.steps or (sum(self.strides) != teacher_steps and not of_student)):
            total = "the number of steps of start" if of_student else f"trajectory.teacher_steps={teacher_steps}"
            raise ValueError(f"strides must be {self.steps} numbers whose sum is {total}, not {self.strides}; strides=[] makes them even")
        if self.start and self.lora:
            raise ValueError("lora learns adapters of the teacher's own weights; leave it or start out")
        self._sizes_fit()
        if self.on_policy.iterations and self.on_policy.prompts > self.trajectory.prompts:
            raise ValueError(f"on_policy.prompts={self.on_policy.prompts} are the first of trajectory.prompts={self.trajectory.prompts}")
        return self

    def _sizes_fit(self) -> None:
        names = [str(size) for size in self.sizes]
        if self.sizes and self.size_px is not None:
            raise ValueError(f"size_px={self.size_px} and sizes=[{', '.join(names)}] do not go together; set size_px=null or sizes=[]")
        if len(set(names)) < len(names):
            raise ValueError(f"sizes=[{', '.join(names)}] names a size twice; name each once")
        if len(names) > 1 and self.follow == "start":
            raise ValueError(f"follow=start learns the steps of a student of one size, not of sizes=[{', '.join(names)}]; set sizes=[]")
        if self.needs_trajectories and self.trajectory.prompts < len(names):
            raise ValueError(f"trajectory.prompts={self.trajectory.prompts} are too few for {len(names)} sizes; give each size one or more")


class FinetuneRecipe(Model):
    """Stage 3: one branch above `split` and one below, then one merged checkpoint."""

    split: float = Field(0.5, gt=0, lt=1)
    merge_high: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.3, 0.5, 0.7], min_length=1, description="weights of the high branch to choose from on held-out prompts; low gets the rest"
    )
    control: bool = Field(False, description="no branches: as many plain updates of one network")
    lora: LoraTraining | None = Field(None, description="branches and fake scores as adapters on frozen student and teacher")
    allow_worse: float = Field(0.0, ge=0, le=1, description="composition below its input's at which a merge is still published")
    matching: MatchingTraining = MatchingTraining()
