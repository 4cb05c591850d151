"""Bounds of the configs of SD3's networks, far above what is published, so that a broken config is refused before anything is made of it.

Fields that a file may leave out have the defaults of their diffusers or transformers class.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from flashgen.families.configs import Config

Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=256)]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 20)]


class Transformer(Config):
    """SD3Transformer2DModel."""

    num_layers: Layers
    num_attention_heads: Width
    attention_head_dim: Width
    caption_projection_dim: Width
    joint_attention_dim: Width
    pooled_projection_dim: Width
    sample_size: int = Field(ge=1, le=1024)
    pos_embed_max_size: int = Field(ge=1, le=1024)
    patch_size: int = Field(ge=1, le=16)
    in_channels: int = Field(ge=1, le=1024)
    out_channels: int = Field(16, ge=1, le=1024)
    dual_attention_layers: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.num_attention_heads * self.attention_head_dim != self.caption_projection_dim:
            raise ValueError("num_attention_heads x attention_head_dim is not caption_projection_dim")
        if self.sample_size > self.patch_size * self.pos_embed_max_size:
            raise ValueError("sample_size is larger than the table of positions, patch_size x pos_embed_max_size")
        return self


class Autoencoder(Config):
    """AutoencoderKL; `scaling_factor` and `shift_factor` normalise the latents."""

    block_out_channels: list[Width] = Field(min_length=2, max_length=8)
    layers_per_block: int = Field(1, ge=1, le=16)
    latent_channels: int = Field(ge=1, le=1024)
    norm_num_groups: Width = 32
    scaling_factor: float = Field(gt=0, le=1e4)
    shift_factor: float = Field(ge=-1e4, le=1e4)
    mid_block_add_attention: bool = True


class Clip(Config):
    """CLIPTextModelWithProjection."""

    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 8
    max_position_embeddings: int = Field(77, ge=2, le=4096)
    vocab_size: Vocabulary = 49408


class T5(Config):
    """T5EncoderModel."""

    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Layers = 6
    num_heads: Width = 8
    vocab_size: Vocabulary = 32128


SCHEMAS: dict[str, type[Config]] = {
    "transformer": Transformer,
    "vae": Autoencoder,
    "text_encoder": Clip,
    "text_encoder_2": Clip,
    "text_encoder_3": T5,
}
