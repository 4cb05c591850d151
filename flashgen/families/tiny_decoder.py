"""The tiny decoder: TAESD3's architecture (diffusers' AutoencoderTiny), which decodes latents in a small share of the VAE's time.

It lies in `tiny_decoder/` beside the pipeline, whose model_index.json does not name it, so diffusers draws with `vae/`. It takes latents on
the transformer's scale, so all families share it: the number of channels and the factor are those of the VAE. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flashgen.families.configs import Config, read_config

TINY_DECODER = "tiny_decoder"  # folder of the component
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # its files

Width = Annotated[int, Field(ge=1, le=4096)]
Blocks = Annotated[int, Field(ge=0, le=64)]


class TinyConfig(Config):
    """AutoencoderTiny as TAESD3 has it: one width, ReLU, nearest neighbours, latents as the transformer has them."""

    latent_channels: int = Field(4, ge=1, le=1024)
    decoder_block_out_channels: list[Width] = Field([64, 64, 64, 64], min_length=1, max_length=8)
    num_decoder_blocks: list[Blocks] = Field([3, 3, 3, 1], min_length=1, max_length=8)
    out_channels: Literal[3] = 3
    act_fn: Literal["relu"] = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    upsampling_scaling_factor: Literal[2] = 2
    scaling_factor: float = Field(1.0, ge=1, le=1)
    shift_factor: float = Field(0.0, ge=0, le=0)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.decoder_block_out_channels)) > 1:
            raise ValueError("decoder_block_out_channels are not all the same")
        if len(self.decoder_block_out_channels) != len(self.num_decoder_blocks):
            raise ValueError("decoder_block_out_channels and num_decoder_blocks differ in length")
        return self


def levels(factor: int) -> int | None:
    """Number of resolutions of a tiny decoder whose pictures have `factor` pixels per latent; None if it is no power of two."""
    return factor.bit_length() if factor & (factor - 1) == 0 else None


def described(vae: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entry `vae` of a family's description for pictures that the tiny decoder in `folder` decodes: its sizes, no attention."""
    return {**vae, "channels": read_config(folder, ".", TinyConfig)["decoder_block_out_channels"][-1], "attention": False}
