"""Recipe sections of `restructure-encoder`, `quantize` and `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from flashgen.pixels import SizePx
from flashgen.recipe.base import Model, Training


class DecoderRecipe(Training):
    """`restructure-encoder --mode decoder`: a tiny decoder that learns what the VAE makes of latents."""

    start: str | None = Field(
        None, min_length=1, description="tiny decoder to start from: a folder, as diffusers' AutoencoderTiny, or hf:OWNER/NAME; null: none"
    )
    width: int = Field(64, ge=1, le=1024, description="channels, without `start`")
    blocks: int = Field(3, ge=0, le=16, description="at each resolution but the last, which has one; without `start`")
    iterations: int = Field(4000, ge=0)
    batch: int = Field(16, ge=1)
    lr: float = Field(1e-3, gt=0)
    ema: float = Field(0.99, ge=0, lt=1)
    crop: int = Field(
        32, ge=1, description="side of the random crops of latents that are decoded, in latents; smaller ones are not cropped"
    )
    gradient: float = Field(0.5, ge=0, description="weight of the error of differences of neighbouring pixels")
    coarse: float = Field(0.5, ge=0, description="weight of the error of the mean colours of squares as large as a latent")
    held_out: int = Field(32, ge=1, description="prompts beside `restructure.prompts` whose latents measure the result")
    psnr_floor_db: float = Field(25.0, ge=0, description="against the VAE, of all pictures of held-out latents together")


class RestructureRecipe(Training):
    """`restructure-encoder`: run without the family's large text encoder, or with a small one in its place; or with a tiny decoder."""

    prompts: int = Field(2048, ge=1)
    iterations: int = Field(300, ge=0, description="training steps of prune and compact against the student that still has the encoder")
    batch: int = Field(64, ge=1)
    lr: float = Field(5e-4, gt=0)
    muon_lr: float = Field(0.0, ge=0, description="of Muon on the matrices of prune's transformer; 0 leaves them to AdamW")
    embedding: int = Field(2000, ge=0, description="steps in which compact first learns the large encoder's own tokens, which are cheap")
    adapter: bool = Field(False, description="prune trains the embedder of text tokens alone, the backbone stays as it is")
    layers: int = Field(0, ge=0, description="of the compact encoder; 0: a quarter of the large one's")
    heads: int = Field(0, ge=0, description="of the compact encoder; 0: half of the large one's")
    d_ff: int = Field(0, ge=0, description="inner width of the compact encoder; 0: half of the large one's")
    ema: float = Field(0.99, ge=0, lt=1)
    floor: float = Field(0.6, ge=0, description="least composition, over the student's own, that is published")
    decoder: DecoderRecipe = DecoderRecipe()


class QuantizeRecipe(Model):
    """`quantize`: which layers get how many bits, and how weights become codes."""

    scheme: Literal["groups", "nf4"] = Field(
        "groups", description="groups: flashgen's codes, for export; nf4: bitsandbytes' for diffusers on a GPU, of all but `protect`"
    )
    method: Literal["rtn", "hqq", "gptq"] = Field("rtn", description="how weights become codes; gptq runs the student on prompts")
    bits: Literal[2, 3, 4, 8] = Field(4, description="of every Linear that is not protected")
    encoder_bits: Literal[0, 4, 8] = Field(0, description="of every Linear of the text encoders; 0 leaves them whole")
    group: Literal["channel", 16, 32, 64, 128, 256] = Field(
        64,
        description="weights that share a scale; channel: all of an output, for the device's int8 products "
        "(8 bits, of which codes use 7, symmetric; 64 in text encoders)",
    )
    symmetric: bool = False
    activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="of group channel: dynamic: one scale per call; static: scales from the student's own rollouts, in the layers "
        "that bear it",
    )
    activation_tolerance: float = Field(0.003, gt=0, description="error of the final latents that static activations may cause")
    protect: list[str] | None = Field(None, description="layers kept at 8 bits, by name prefix; null: the family's")
    budget: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?\s*([kKmMgG]i?B)?$",
        description="mean bits or bytes: bits by measured error instead of `bits` and `protect`",
    )
    choices: list[Literal[2, 3, 4, 8]] = Field([3, 4, 8], min_length=1, description="bits that a budget may give a group of layers")
    low_rank_tolerance: float = Field(
        0.0, ge=0, description="error of the final latents that a shared adaLN basis may cause; 0 leaves these layers as they are"
    )
    step_scales: bool = Field(False, description="two scalars a step that bring the quantized student's states back to the student's")
    prompts: int = Field(
        64, ge=2, description="run through the student for gptq, a budget, static activations, a shared basis and step scales"
    )

    @property
    def encoder_group(self) -> int:
        """Weights that share a scale in text encoders, which run once per prompt and gain nothing from integer products."""
        return 64 if self.group == "channel" else self.group

    @property
    def calibrated(self) -> bool:
        """Return True if the student is run: for the inputs of its layers, or to measure errors of its pictures."""
        return bool(self.method == "gptq" or self.budget or self.activations == "static" or self.low_rank_tolerance or self.step_scales)

    @field_validator("budget", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) else value  # YAML reads 4.25 as a number

    @model_validator(mode="after")
    def _zero_points(self) -> QuantizeRecipe:
        if self.scheme == "nf4" and (
            self.method != "rtn" or self.budget or self.low_rank_tolerance or self.step_scales or self.encoder_bits
        ):
            raise ValueError("scheme nf4 has no method, budget, low_rank_tolerance, step_scales and encoder_bits; leave them out")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("method hqq moves zero points, which symmetric groups have not; set symmetric to false")
        if self.group == "channel" and (self.bits, self.symmetric, self.method, self.budget, self.low_rank_tolerance) != (
            8,
            True,
            "rtn",
            None,
            0,
        ):
            raise ValueError("group channel is for bits 8, symmetric true and method rtn, without budget and low_rank_tolerance")
        if self.activations == "static" and self.group != "channel":
            raise ValueError("activations static is for products of integers: set bits 8, group channel and symmetric true")
        return self


class ExportRecipe(Model):
    """`export`: components for a runtime without torch."""

    size_px: SizePx | None = Field(None, description="of the pictures: 512, or WIDTHxHEIGHT; null: as the student was trained")
    accuracy_level: Literal[0, 1, 4] = Field(0, description="MatMulNBits: 0 and 1 compute in fp32, 4 rounds activations to int8")
    precision: Literal["float32", "float16"] = Field(
        "float32", description="in which the transformer and the VAE compute; float16 for GPUs, with inputs and outputs in fp32"
    )
    psnr_floor_db: float = Field(60.0, gt=0, description="of each component against torch, range of the output over RMS error")
    psnr_floor_int8_db: float = Field(30.0, gt=0, description="the same for components whose codes run at accuracy level 4, or in fp16")
    vae_encoder: bool = Field(False, description="export it too, for generate --init-image; 68 MB for SD3.5-Medium")
    decoder: Literal["auto", "vae", "tiny"] = Field("auto", description="what decodes; auto: the tiny decoder of an artifact that has one")
