"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, joint attention (MMDiT), a VAE of factor 8."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.families.base import Costs, Family, Forward, OriginalTensor, TextEncoder
from flashgen.families.conditioning import Conditioning
from flashgen.families.configs import Config, Configs
from flashgen.families.sd3.configs import SCHEMAS
from flashgen.families.sd3.restructuring import WithoutT5
from flashgen.pixels import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashgen.artifact.manifest import Manifest, Sampler
    from flashgen.families.cards import Published, Usage
    from flashgen.families.graphs import Component
    from flashgen.models.pipeline import Pipeline
    from flashgen.recipe.schema import CheckpointRecipe
    from flashgen.recipe.teacher import TeacherRecipe
    from flashgen.worlds.base import TeacherData

LAYER_CLASSES = {
    r"\.attn2?\.(to_[qkv]|add_[qkv]_proj)$": "attention in",
    r"\.attn2?\.(to_out\.0|to_add_out)$": "attention out",
    r"\.ff(_context)?\.net\.0\.proj$": "feed-forward up",
    r"\.ff(_context)?\.net\.2$": "feed-forward down",
    r"\.norm1\.linear(\.up)?$": "adaLN image",
    r"\.norm1_context\.linear(\.up)?$": "adaLN text",
}


class SD3(Family):
    """SD3-Medium, SD3.5-Medium, SD3.5-Large and everything else that `StableDiffusion3Pipeline` loads."""

    name = "sd3"
    models = "Stable Diffusion 3 and 3.5"
    pipeline_class = "StableDiffusion3Pipeline"
    text_encoders: ClassVar[Mapping[str, TextEncoder]] = {
        "text_encoder": TextEncoder("tokenizer", "clip"),
        "text_encoder_2": TextEncoder("tokenizer_2", "clip"),
        "text_encoder_3": TextEncoder("tokenizer_3", "t5"),
    }
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    schemas: ClassVar[Mapping[str, type[Config]]] = SCHEMAS
    droppable = "text_encoder_3"
    restructuring = WithoutT5()
    protect = ("proj_out", "pos_embed", "norm_out", "context_embedder", "time_text_embed")
    lora_targets = r".*transformer_blocks.*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2)"
    modulation = re.compile(r"transformer_blocks\.\d+\.norm\w*\.linear$")
    costs = Costs(kept=35, kept_with_adapters=70, running=40)
    skip_argument = "skip_layers"
    architectures = ("shapes", "tiny", "sd3-medium", "sd35-medium", "sd35-large")
    gguf_arch = "sd3"

    # ---- sizes and names

    def vae_factor(self, configs: Configs) -> int:
        return int(2 ** (len(configs("vae")["block_out_channels"]) - 1))

    def latent_shape(self, configs: Configs, size: Size) -> tuple[int, int, int]:
        factor = self.vae_factor(configs)
        return int(configs("transformer")["in_channels"]), size.height // factor, size.width // factor

    def size_limits(self, configs: Configs) -> tuple[int, int]:
        transformer = configs("transformer")
        unit = int(transformer["patch_size"]) * self.vae_factor(configs)
        return unit, unit * int(transformer["pos_embed_max_size"])

    def import_sampler(self, folder: Path) -> Sampler:
        from flashgen.families.sd3.sampling import import_sampler

        return import_sampler(self, folder)

    def layer_group(self, name: str) -> tuple[str, str | None]:
        block = re.match(r"transformer_blocks\.\d+", name)
        kind = next((kind for pattern, kind in LAYER_CLASSES.items() if re.search(pattern, name)), None)
        return (block[0] if block else name), kind

    def forward_size(self, configs: Configs, linears: Mapping[str, tuple[int, ...]], size: Size, tokens: Mapping[str, int]) -> Forward:
        config = configs("transformer")
        channels, height, width = self.latent_shape(configs, size)
        image = (height // int(config["patch_size"])) * (width // int(config["patch_size"]))
        text = sum(tokens.values())
        hidden = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        multiply_adds = 0.0
        for name, shape in linears.items():
            one_vector = re.search(r"norm|time_text_embed", name)  # computed once per picture, not per token
            rows = 1 if one_vector else text if re.search(r"context|add_", name) else image
            multiply_adds += prod(shape) * rows
        dual = len(config.get("dual_attention_layers", ()))
        multiply_adds += 2 * hidden * (int(config["num_layers"]) * (image + text) ** 2 + dual * image**2)
        return Forward(image + text, hidden, int(config["num_layers"]), multiply_adds, channels * height * width)

    def num_blocks(self, configs: Configs) -> int:
        return int(configs("transformer")["num_layers"])

    def conditioning_numbers(self, configs: Configs, tokens: Mapping[str, int]) -> int:
        config = configs("transformer")
        return int(config["joint_attention_dim"]) * sum(tokens.values()) + int(config["pooled_projection_dim"])

    def original_tensors(self, names: Sequence[str]) -> list[OriginalTensor]:
        from flashgen.families.sd3.original import originals

        return originals(names)

    def description(self, configs: Configs, sampler: Sampler, pad_ids: Mapping[str, int]) -> dict[str, Any]:
        from flashgen.families.sd3.description import describe

        return describe(self, configs, sampler, pad_ids)

    def describe_old(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        from flashgen.families.sd3.description import describe_old

        return describe_old(self, folder, manifest)

    def usage(self, sampler: Sampler, prompt: str, base: str) -> Usage:
        from flashgen.families.sd3.usage import usage

        return usage(sampler, prompt, base)

    def published(self, configs: Configs) -> Published | None:
        from flashgen.families.sd3.usage import published

        return published(configs("transformer"))

    # ---- torch

    def set_scheduler(self, folder: Path, sampler: Sampler) -> bool:
        from flashgen.families.sd3.scheduler import set_scheduler

        return set_scheduler(folder, sampler.sigmas)

    def network_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        return {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        }

    def tokenize(self, pipe: Pipeline, prompts: list[str], sampler: Sampler) -> dict[str, dict[str, Tensor]]:
        from flashgen.families.sd3.text import tokenize

        return tokenize(pipe, prompts, sampler)

    def encode(self, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]], sampler: Sampler) -> Conditioning:
        from flashgen.families.sd3.text import encode

        return encode(self, pipe, inputs, sampler)

    def transformer_inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": cond.tensors["embeds"],
            "pooled_projections": cond.tensors["pooled"],
            "timestep": 1000 * sigma,
        }

    def velocity(self, output: Tensor, x: Tensor) -> Tensor:
        return output

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        latents: Tensor = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def from_latents(self, vae: Any, latents: Tensor) -> Tensor:
        images: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return images

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return transformer.transformer_blocks  # type: ignore[return-value]  # torch types attributes of modules as Tensor | Module

    def block_features(self, output: Any, x: Tensor) -> Tensor:
        tokens: Tensor = output[1]  # a block returns (text, image)
        height, width = x.shape[-2:]
        rows = round((tokens.shape[1] * height / width) ** 0.5)
        return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, tokens.shape[1] // rows)

    def width(self, transformer: nn.Module) -> int:
        config: Any = transformer.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def export_components(self, pipe: Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
        from flashgen.families.sd3.components import components

        return components(pipe, sampler, vae_encoder)

    def prepare_export(self, transformer: nn.Module, latent_shape: tuple[int, ...]) -> None:
        from flashgen.families.sd3.attention import fuse_attention
        from flashgen.families.sd3.components import crop_positions

        crop_positions(transformer, *latent_shape[-2:])
        fuse_attention(transformer)

    def write_random(self, like: str, layers: int | None, words: Sequence[str] | None, folder: Path, seed: int) -> Sampler:
        from flashgen.families.sd3.random_weights import write_random
        from flashgen.families.sd3.sampling import random_sampler
        from flashgen.families.sd3.specs import spec

        shapes = spec(like) if layers is None else spec(like).shallow(layers)
        write_random(shapes, folder, seed, words)
        return random_sampler(shapes)

    def train_teacher(
        self, data: TeacherData, held_out: Sequence[str], config: TeacherRecipe, seed: int, work: Path, checkpoint: CheckpointRecipe
    ) -> tuple[Pipeline, Sampler]:
        from flashgen.families.sd3.teacher import train_teacher

        return train_teacher(data, held_out, config, seed, work, checkpoint)
