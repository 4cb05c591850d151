"""Recipe models. Unknown keys are errors; every number a stage uses is a field here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


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


class FlowTraining(Model):
    samples: int = Field(40_000, ge=1, description="rendered scenes in the data set")
    steps: int = Field(3700, ge=1)
    batch: int = Field(128, ge=1)
    decay_share: float = Field(0.45, gt=0, le=1, description="share of the steps over which the learning rates fall to zero")
    muon_lr: float = Field(2e-2, gt=0)
    adam_lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(0.995, ge=0, lt=1)
    encoder_drop: float = Field(0.464, ge=0, lt=1, description="each text encoder independently, as in SD3")
    caption_drop: float = Field(0.05, ge=0, lt=1, description="prompts replaced by the empty one, which guidance uses")
    sigma_mean: float = 1.1  # ln 3: the logit-normal density under the sampler's shift of 3
    sigma_std: float = Field(1.2, gt=0)
    t5_tokens: int = Field(16, ge=1)
    bf16: bool = False
    compile: bool = Field(True, description="torch.compile the transformer; 1.2 to 1.3 x faster here, needs a C++ compiler")


class TrajectoryTraining(Model):
    """Stage 1: trajectory guidance."""

    teacher_steps: int = Field(32, ge=2, description="must be a multiple of the student's steps, so that the grids nest")
    prompts: int = Field(2048, ge=1, description="teacher trajectories in the cache, one prompt and noise each")
    iterations: int = Field(1500, ge=0)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    guidance: float = Field(4.5, ge=1, description="v_u + guidance (v_c - v_u)")


class MatchingTraining(Model):
    """Stage 2: distribution matching with timestep sharing."""

    prompts: int = Field(4096, ge=1)
    iterations: int = Field(300, ge=0)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-4, gt=0)
    proxy_lr: float = Field(2e-4, gt=0)
    proxy_updates: int = Field(2, ge=1, description="proxy steps a student step")
    proxy_warmup: int = Field(0, ge=0, description="first rounds that fit the proxy alone; a proxy that still is the teacher misleads")
    guidance: float = Field(4.5, ge=1, description="of the teacher's score; the proxy is never guided")
    floor: float = Field(0.1, gt=0, description="of the per-sample normaliser")
    ema: float = Field(0.99, ge=0, lt=1)


class DistillRecipe(Model):
    steps: int = Field(4, ge=1, le=16, description="student steps")
    t5_drop: float = Field(0.25, ge=0, le=1, description="share of samples without T5, so that it can be left out later")
    trajectory: TrajectoryTraining = TrajectoryTraining()
    matching: MatchingTraining = MatchingTraining()


class FinetuneRecipe(Model):
    """Stage 3: one branch above `split` and one below, then one merged checkpoint."""

    split: float = Field(0.5, gt=0, lt=1)
    merge_high: float = Field(0.7, ge=0, le=1, description="weight of the high-noise branch; the other gets the rest")
    matching: MatchingTraining = MatchingTraining()


class RestructureRecipe(Model):
    prompts: int = Field(2048, ge=1)
    iterations: int = Field(300, ge=0, description="recovery steps against the student that still has T5 (prune only)")
    batch: int = Field(64, ge=1)
    lr: float = Field(5e-4, gt=0)


class QuantizeRecipe(Model):
    bits: int = Field(4, ge=4, le=4)
    group: Literal[16, 32, 64, 128, 256] = Field(64, description="weights that share a scale")
    symmetric: bool = False
    protect: list[str] = Field(
        ["proj_out", "pos_embed", "norm_out", "context_embedder", "time_text_embed"], description="layers kept at 8 bits, by name prefix"
    )


class TeacherRecipe(Model):
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    encoders: EncoderTraining = EncoderTraining()
    flow: FlowTraining = FlowTraining()
    guidance: float = Field(3.0, ge=1, description="default guidance of the artifact")


class ExportRecipe(Model):
    accuracy_level: Literal[0, 1, 4] = Field(0, description="MatMulNBits: 0 and 1 compute in fp32, 4 rounds activations to int8")
    psnr_floor_db: float = Field(60.0, gt=0, description="of each component against torch, range of the output over RMS error")
    psnr_floor_int8_db: float = Field(30.0, gt=0, description="the same for the transformer at accuracy level 4")


class BenchRecipe(Model):
    per_task: int = Field(20, ge=1, description="prompts of each of the six tasks that a score is taken on")
    warmup: int = Field(1, ge=0, description="pictures drawn before the measured ones")
    repeats: int = Field(5, ge=1, description="pictures measured, one at a time")
    batch: int = Field(30, ge=1, description="pictures drawn together for a quality score")


class Recipe(Model):
    """Everything the stages may ask for; `flashgen.recipe.load` reads it from YAML."""

    name: str = Field(min_length=1)
    teacher: TeacherRecipe = TeacherRecipe()
    distill: DistillRecipe = DistillRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    restructure: RestructureRecipe = RestructureRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    export: ExportRecipe = ExportRecipe()
    bench: BenchRecipe = BenchRecipe()
