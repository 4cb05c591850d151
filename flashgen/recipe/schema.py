"""Recipe models. Unknown keys are errors; every number a stage uses is a field here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AutoencoderTraining(Model):
    steps: int = Field(3600, ge=1)
    batch: int = Field(48, ge=1)
    crop_px: int = Field(32, ge=16)
    crop_share: float = Field(0.7, ge=0, le=1, description="share of the steps on crops; the rest sees whole pictures")
    lr: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-3, ge=0)


class EncoderTraining(Model):
    """Text encoders, on captions alone."""

    steps: int = Field(800, ge=1)
    batch: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    pooled_norm: float = Field(1.0, gt=0, description="mean length of each CLIP-type encoder's pooled vector")


class FlowTraining(Model):
    samples: int = Field(32_000, ge=1, description="rendered scenes in the data set")
    steps: int = Field(8000, ge=1)
    batch: int = Field(64, ge=1)
    decay_share: float = Field(0.8, gt=0, le=1, description="share of the steps over which the learning rates fall")
    muon_lr: float = Field(2e-2, gt=0)
    adam_lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(0.995, ge=0, lt=1)
    encoder_drop: float = Field(0.464, ge=0, lt=1, description="each text encoder independently, as in SD3")
    caption_drop: float = Field(0.05, ge=0, lt=1, description="prompts replaced by the empty one, which guidance uses")
    sigma_mean: float = 1.6  # the logit-normal density under the sampler's shift (ln 3) and a little above, where layout is decided
    sigma_std: float = Field(1.2, gt=0)
    t5_tokens: int = Field(16, ge=1)
    bf16: bool = False
    compile: bool = Field(True, description="torch.compile the transformer; 1.2 to 1.3 x faster here, needs a C++ compiler")


def by_step(name: str, given: list[float], steps: int) -> list[float]:
    """One weight a student step; ValueError when `given` is neither one for all of them nor one for each."""
    if len(given) not in (1, steps) or min(given) < 0:
        raise ValueError(f"{name} must hold one weight >= 0 for all steps or one for each of the {steps}, not {given}")
    return given * steps if len(given) == 1 else given


class Regression(Model):
    """Of the student onto steps of whom it follows."""

    iterations: int = Field(0, ge=0, description="0 leaves it out")
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices inside blocks; 0 leaves them to AdamW")
    huber: float = Field(0.0, ge=0, description="c of the pseudo-Huber loss of a sample's velocity; 0 is the squared error")
    node_draws: list[float] = Field([1], description="how often each student step is drawn, relative to the others")
    watch_every: int = Field(0, ge=0, description="updates between looks at held-out prompts; 0 never looks")


class TrajectoryTraining(Regression):
    """Stage 1: trajectory guidance."""

    iterations: int = Field(1500, ge=0)
    teacher_steps: int = Field(32, ge=2, description="a multiple of the student's steps, or the sum of `strides`, so that the grids nest")
    prompts: int = Field(2048, ge=1, description="trajectories in the cache, one prompt and noise each")
    guidance: float = Field(4.5, ge=1, description="of the teacher: v_u + guidance (v_c - v_u)")


class CorrectionTraining(Regression):
    """After it, from the student's own states on the same prompts: where the leader would go from there. And on the trajectories."""

    prompts: int = Field(2048, ge=1, description="the first so many of `trajectory.prompts`, with other noise")


class AdversarialTraining(Model):
    """Discriminator heads on the proxy's features; their weight a node is `node_adversarial`."""

    blocks: list[int] = Field([], description="transformer blocks whose image tokens are judged; none: the middle one and the last")
    lr: float = Field(1e-4, gt=0)
    refresh: float = Field(0.005, ge=0, le=1, description="probability a step that a head forgets everything")
    band: list[float] = Field([0.05, 0.2], min_length=2, max_length=2, description="size of its direction over the matching one")

    @field_validator("band")
    @classmethod
    def _from_low_to_high(cls, band: list[float]) -> list[float]:
        if not 0 <= band[0] <= band[1]:
            raise ValueError(f"must be two sizes, the lower first and not below 0, not {band}")
        return band


class MatchingTraining(Model):
    """Stage 2: distribution matching. The defaults are SD3.5-Flash's timestep sharing.

    A `node_*` list holds one weight for all student steps, or one a step.
    """

    point: Literal["shared", "renoise", "interval"] = Field("shared", description="where scores are compared")
    last: Literal["interp", "renoise"] = Field("renoise", description="how `shared` gets to a noise level on its last step")
    augmentation: Literal["tied", "decoupled"] = Field("tied", description="guidance at that point, or at one of its own below the node")
    proxy_target: Literal["rollout", "step", "interval"] = Field("rollout", description="what the proxy is fitted on")
    proxy_coupling: float = Field(1.0, gt=0, le=1, description="proxy <- c proxy + (1 - c) student after each update")
    node_matching: list[float] = [1.0]
    node_augmentation: list[float] = [1.0]
    node_adversarial: list[float] = [0.0]
    node_trajectory: list[float] = [0.0]
    adversarial: AdversarialTraining = AdversarialTraining()

    prompts: int = Field(4096, ge=1)
    iterations: int = Field(300, ge=0)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-4, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices inside blocks; 0 leaves them to AdamW")
    decay_share: float = Field(0.0, ge=0, le=1, description="share of the updates over which the student's rates fall, linearly, to 2 %")
    proxy_lr: float = Field(2e-4, gt=0)
    proxy_muon_lr: float = Field(0.0, ge=0, description="the same for the proxy")
    proxy_updates: int = Field(2, ge=1, description="proxy steps a student step")
    proxy_warmup: int = Field(0, ge=0, description="first rounds that fit the proxy alone; a proxy that still is the teacher misleads")
    guidance: float = Field(4.5, ge=1, description="of the teacher's score; the proxy is never guided")
    floor: float = Field(0.1, gt=0, description="of the per-sample normaliser")
    ema: float = Field(0.99, ge=0, lt=1)
    watch_every: int = Field(0, ge=0, description="rounds between looks at held-out prompts, the best of which is kept; 0 never looks")

    def node_weights(self, steps: int) -> dict[str, list[float]]:
        """One weight a student step of each term; ValueError when a list fits neither all steps nor each."""
        terms = ("matching", "augmentation", "adversarial", "trajectory")
        return {term: by_step(f"node_{term}", getattr(self, f"node_{term}"), steps) for term in terms}

    def wants_trajectories(self, steps: int) -> bool:
        """Whether a term needs those of whom is followed: the adversary's real pictures, or trajectory guidance."""
        weights = self.node_weights(steps)
        return self.iterations > 0 and any(weights["adversarial"] + weights["trajectory"])


class LoraTraining(Model):
    """Teacher, student and proxy as adapters on one frozen backbone: memory for one network and two small sets of matrices."""

    rank: int = Field(64, ge=1)
    alpha: int = Field(0, ge=0, description="the update is alpha / rank B A; 0: alpha = rank")
    targets: str = Field(
        r".*transformer_blocks.*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2)",
        description="modules that get an adapter, as a regular expression",
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    base: Literal["float32", "bfloat16"] = Field("float32", description="type of the frozen weights; adapters stay in float32")


class DistillRecipe(Model):
    steps: int = Field(4, ge=1, le=16, description="student steps")
    size_px: int | None = Field(None, ge=16, description="of the pictures to train on; none: the teacher's")
    strides: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="steps of whom is followed that each step covers; none: as many each"
    )
    start: str | None = Field(None, description="a student whose transformer is gone on from, of any number of steps; none: the teacher's")
    follow: Literal["teacher", "start"] = Field("teacher", description="whose steps are learned: the guided teacher's, or those of `start`")
    t5_drop: float = Field(0.25, ge=0, le=1, description="share of samples without T5, so that it can be left out later")
    lora: LoraTraining | None = Field(None, description="adapters on one backbone instead of three whole networks")
    compile: bool = Field(False, description="torch.compile what follows and learns trajectories; needs a C++ compiler")
    trajectory: TrajectoryTraining = TrajectoryTraining()
    correction: CorrectionTraining = CorrectionTraining()
    matching: MatchingTraining = MatchingTraining()

    @property
    def batches(self) -> list[int]:
        """Of the trainings that are not left out."""
        parts = ((self.trajectory.iterations, self.trajectory.batch), (self.correction.iterations, self.correction.batch),
                 (self.matching.iterations, self.matching.batch))  # fmt: skip
        return [batch for iterations, batch in parts if iterations]

    @property
    def wants_trajectories(self) -> bool:
        return self.trajectory.iterations + self.correction.iterations > 0 or self.matching.wants_trajectories(self.steps)

    @model_validator(mode="after")
    def _fits_together(self) -> DistillRecipe:
        self.matching.node_weights(self.steps)
        for part in (self.trajectory, self.correction):
            if not any(by_step("node_draws", part.node_draws, self.steps)):
                raise ValueError("node_draws draws no step at all; give one a number above 0")
        whole = self.trajectory.teacher_steps
        led = self.follow == "start"  # whose number of steps is known when it is opened
        if self.strides and (len(self.strides) != self.steps or (sum(self.strides) != whole and not led)):
            sum_of = "the number of steps of start" if led else f"trajectory.teacher_steps={whole}"
            raise ValueError(f"strides must be {self.steps} numbers whose sum is {sum_of}, not {self.strides}; strides=[] makes them even")
        if self.compile and self.lora:
            raise ValueError("compile=true does not go with lora, whose roles take turns in one network; set compile=false")
        if self.start and self.lora:
            raise ValueError("lora learns adapters of the teacher's own weights; leave it or start out")
        if self.correction.iterations and self.correction.prompts > self.trajectory.prompts:
            raise ValueError(f"correction.prompts={self.correction.prompts} are the first of trajectory.prompts={self.trajectory.prompts}")
        return self


class FinetuneRecipe(Model):
    """Stage 3: one branch above `split` and one below, then one merged checkpoint."""

    split: float = Field(0.5, gt=0, lt=1)
    merge_high: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.3, 0.5, 0.7], min_length=1, description="weights of the high branch to choose from on held-out prompts; low gets the rest"
    )
    control: bool = Field(False, description="no branches: as many plain updates of one network")
    lora: LoraTraining | None = Field(None, description="branches and proxies as adapters on frozen student and teacher")
    allow_worse: float = Field(0.0, ge=0, le=1, description="composition below its input's at which a merge is still published")
    matching: MatchingTraining = MatchingTraining()


class RestructureRecipe(Model):
    prompts: int = Field(2048, ge=1)
    iterations: int = Field(300, ge=0, description="training steps of prune and compact against the student that still has T5")
    batch: int = Field(64, ge=1)
    lr: float = Field(5e-4, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices of prune's transformer; 0 leaves them to AdamW")
    embedding: int = Field(2000, ge=0, description="steps in which compact first learns T5's own tokens, which are cheap")
    adapter: bool = Field(False, description="prune trains the embedder of CLIP's tokens alone, the backbone stays as it is")
    layers: int = Field(0, ge=0, description="of the compact encoder; 0: a quarter of T5's")
    heads: int = Field(0, ge=0, description="of the compact encoder; 0: half of T5's")
    d_ff: int = Field(0, ge=0, description="inner width of the compact encoder; 0: half of T5's")
    floor: float = Field(0.6, ge=0, description="least composition, over the student's own, that is published")


class QuantizeRecipe(Model):
    scheme: Literal["groups", "nf4"] = Field(
        "groups", description="groups: flashgen's codes, for export; nf4: bitsandbytes' for diffusers on a GPU, of all but `protect`"
    )
    method: Literal["rtn", "hqq", "gptq"] = Field("rtn", description="how weights become codes; gptq runs the student on prompts")
    bits: Literal[2, 3, 4, 8] = Field(4, description="of every Linear that is not protected")
    encoder_bits: Literal[0, 4, 8] = Field(0, description="of every Linear of the text encoders; 0 leaves them whole")
    group: Literal["channel", 16, 32, 64, 128, 256] = Field(
        64,
        description="weights that share a scale; channel: all of an output, for the device's int8 products "
        "(8 bits, symmetric; 64 in text encoders)",
    )
    symmetric: bool = False
    protect: list[str] = Field(
        ["proj_out", "pos_embed", "norm_out", "context_embedder", "time_text_embed"], description="layers kept at 8 bits, by name prefix"
    )
    budget: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?\s*([kKmMgG]i?B)?$",
        description="mean bits or bytes: bits by measured damage instead of `bits` and `protect`",
    )
    choices: list[Literal[2, 3, 4, 8]] = Field([3, 4, 8], min_length=1, description="bits that a budget may give a group of layers")
    basis_tolerance: float = Field(
        0.0, ge=0, description="damage to the final latents that adaLN layers on one shared basis may do; 0 leaves these layers whole"
    )
    repair: bool = Field(False, description="two scalars a step that bring the quantized student's states back to the student's")
    prompts: int = Field(64, ge=2, description="that the student is run on for gptq, a budget, a shared basis and repair")

    def group_of(self, inputs: int) -> int:
        """Weights that share a scale in a layer of so many inputs."""
        return inputs if self.group == "channel" else self.group

    @property
    def encoder_group(self) -> int:
        """The same of text encoders: they run once a prompt, so that integer products are not for them."""
        return 64 if self.group == "channel" else self.group

    def bits_of(self, name: str) -> int:
        """Bits of a layer where no budget gives them out."""
        return 8 if name.startswith(tuple(self.protect)) else self.bits

    @property
    def calibrated(self) -> bool:
        """Whether the student is run: for the inputs of its layers, or for what a choice does to its pictures."""
        return bool(self.method == "gptq" or self.budget or self.basis_tolerance or self.repair)

    @field_validator("budget", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) else value  # YAML reads 4.25 as a number

    @model_validator(mode="after")
    def _zero_points(self) -> QuantizeRecipe:
        if self.scheme == "nf4" and (self.method != "rtn" or self.budget or self.basis_tolerance or self.repair or self.encoder_bits):
            raise ValueError("scheme nf4 has no method, budget, basis_tolerance, repair and encoder_bits; leave them out")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("method hqq moves zero points, which symmetric groups have not; set symmetric to false")
        if self.group == "channel" and (self.bits, self.symmetric, self.method, self.budget, self.basis_tolerance) != (
            8,
            True,
            "rtn",
            None,
            0,
        ):
            raise ValueError("group channel is for bits 8, symmetric true and method rtn, without budget and basis_tolerance")
        return self


class TeacherRecipe(Model):
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    encoders: EncoderTraining = EncoderTraining()
    flow: FlowTraining = FlowTraining()
    guidance: float = Field(3.0, ge=1, description="default guidance of the artifact")


class ExportRecipe(Model):
    size_px: int | None = Field(None, ge=8, multiple_of=8, description="of the pictures; None: as the student was trained")
    accuracy_level: Literal[0, 1, 4] = Field(0, description="MatMulNBits: 0 and 1 compute in fp32, 4 rounds activations to int8")
    psnr_floor_db: float = Field(60.0, gt=0, description="of each component against torch, range of the output over RMS error")
    psnr_floor_int8_db: float = Field(30.0, gt=0, description="the same for components whose codes run at accuracy level 4")
    vae_encoder: bool = Field(False, description="export it too, for generate --init-image; 68 MB for SD3.5-Medium")


class BenchRecipe(Model):
    per_task: int = Field(20, ge=0, description="prompts of each of the six tasks that a score is taken on; 0: stages take none")
    warmup: int = Field(1, ge=0, description="pictures drawn before the measured ones")
    repeats: int = Field(5, ge=1, description="pictures measured, one at a time")
    batch: int = Field(30, ge=1, description="pictures drawn together for a quality score")


class Recipe(Model):
    """Everything the stages may ask for; `flashgen.recipe.load` reads it from YAML."""

    name: str = Field(min_length=1)
    prompts_file: Path | None = Field(None, description="what stages train and calibrate on, a prompt a line; null: the shapes world's")
    teacher: TeacherRecipe = TeacherRecipe()
    distill: DistillRecipe = DistillRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    restructure: RestructureRecipe = RestructureRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    export: ExportRecipe = ExportRecipe()
    bench: BenchRecipe = BenchRecipe()
