"""Recipe sections of `teacher train`."""

from __future__ import annotations

from pydantic import Field

from flashgen.recipe.base import Beta, Model, Training


class AutoencoderTraining(Training):
    """The world's autoencoder, on rendered pictures."""

    steps: int = Field(3600, ge=1)
    batch: int = Field(48, ge=1)
    crop_px: int = Field(32, ge=16)
    crop_share: float = Field(0.7, ge=0, le=1, description="share of the steps on crops; the rest sees full pictures")
    lr: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-3, ge=0)
    warmup: int = Field(50, ge=1)


class EncoderTraining(Training):
    """Text encoders, on captions alone."""

    steps: int = Field(800, ge=1)
    batch: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0)
    vector_norm: float = Field(1.0, gt=0, description="mean length of each CLIP-type encoder's text vector")
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    warmup: int = Field(50, ge=1)


class FlowTraining(Training):
    """The transformer, by rectified flow on the frozen rest."""

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
    warmup: int = Field(100, ge=1)


class TeacherRecipe(Model):
    """`teacher train`: the embedded world's teacher from nothing."""

    autoencoder: AutoencoderTraining = AutoencoderTraining()
    encoders: EncoderTraining = EncoderTraining()
    flow: FlowTraining = FlowTraining()
    guidance: float = Field(3.0, ge=1, description="default guidance of the artifact")
