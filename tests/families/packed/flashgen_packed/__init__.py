"""A model family that differs from Stable Diffusion 3 wherever a family can differ. It lives in flashgen's tests only.

One text encoder with an attention mask, in a folder that is not called text_encoder; no pooled vector; latents packed into tokens; a
VAE of factor 4 with quantization convolutions; output -v at time 1 - sigma; blocks that return one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashgen.families.base import Costs, Family, Forward, TextEncoder
from flashgen.families.conditioning import Conditioning
from flashgen.families.configs import Configs
from flashgen.pixels import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashgen.artifact.manifest import Sampler
    from flashgen.families.graphs import Component
    from flashgen.models.pipeline import Pipeline

ENCODER = "language_model"
PATCH = 2  # latents along a side of a token
LARGEST_PX = 512
LAYER_CLASSES = {
    r"\.to_[qkv]$": "attention in",
    r"\.to_out$": "attention out",
    r"\.mlp\.up$": "feed-forward up",
    r"\.mlp\.down$": "feed-forward down",
    r"\.ada\.linear(\.up)?$": "adaLN",
}


class Packed(Family):
    """Networks of `flashgen_packed.network`, BERT and diffusers' AutoencoderKL."""

    name = "packed"
    models = "the packed family of flashgen's tests"
    pipeline_class = "PackedPipeline"
    text_encoders: ClassVar[Mapping[str, TextEncoder]] = {ENCODER: TextEncoder("tokenizer", "bert")}
    protect = ("final", "image_in", "text_in", "time_in")
    lora_targets = r"layers\.\d+\.(to_q|to_k|to_v|to_out|mlp\.up|mlp\.down)"
    modulation = re.compile(r"layers\.\d+\.ada\.linear$")
    costs = Costs(kept=22, kept_with_adapters=40, running=20)
    architectures = ("packed-tiny",)

    # ---- sizes and names

    def vae_factor(self, configs: Configs) -> int:
        return int(2 ** (len(configs("vae")["block_out_channels"]) - 1))

    def latent_shape(self, configs: Configs, size: Size) -> tuple[int, int, int]:
        factor = self.vae_factor(configs)
        return int(configs("transformer")["in_channels"]), size.height // factor, size.width // factor

    def size_limits(self, configs: Configs) -> tuple[int, int]:
        return PATCH * self.vae_factor(configs), LARGEST_PX

    def import_sampler(self, folder: Path) -> Sampler:
        from .sampling import import_sampler

        return import_sampler(folder)

    def layer_group(self, name: str) -> tuple[str, str | None]:
        block = re.match(r"layers\.\d+", name)
        kind = next((kind for pattern, kind in LAYER_CLASSES.items() if re.search(pattern, name)), None)
        return (block[0] if block else name), kind

    def forward_size(self, configs: Configs, linears: Mapping[str, tuple[int, ...]], size: Size, tokens: Mapping[str, int]) -> Forward:
        channels, height, width = self.latent_shape(configs, size)
        image, text = (height // PATCH) * (width // PATCH), tokens["bert"]
        hidden, blocks = int(configs("transformer")["width"]), self.num_blocks(configs)
        multiply_adds = 2.0 * blocks * hidden * (image + text) ** 2
        for name, shape in linears.items():
            one_vector = re.search(r"\.ada\.|^time_in", name)
            rows = 1 if one_vector else text if name == "text_in" else image if name in ("image_in", "final") else image + text
            multiply_adds += prod(shape) * rows
        return Forward(image + text, hidden, blocks, multiply_adds, channels * height * width)

    def num_blocks(self, configs: Configs) -> int:
        return int(configs("transformer")["num_layers"])

    def conditioning_numbers(self, configs: Configs, tokens: Mapping[str, int]) -> int:
        return tokens["bert"] * (int(configs("transformer")["text_width"]) + 1)

    def description(self, configs: Configs, sampler: Sampler, pad_ids: Mapping[str, int]) -> dict[str, Any]:
        shape, vae = self.latent_shape(configs, sampler.size_px), configs("vae")
        encoder = {
            "component": ENCODER,
            "tokenizer": "tokenizer",
            "length": sampler.tokens["bert"],
            "pad_id": pad_ids["tokenizer"],
            "ids": "input_ids",
            "mask": "attention_mask",
            "mask_value": "mask",
            "outputs": {"states": "last_hidden_state"},
            "width": int(configs(ENCODER)["hidden_size"]),
        }
        transformer = {
            "latents": "hidden_states",
            "timestep": "timestep",
            "timestep_scale": -1.0,
            "timestep_offset": 1.0,
            "output": "sample",
            "output_scale": -1.0,
            "patch": PATCH,
            "tokens": (shape[1] // PATCH) * (shape[2] // PATCH) + sampler.tokens["bert"],
            "width": int(configs("transformer")["width"]),
        }
        return {
            "encoders": [encoder],
            "conditioning": {"encoder_hidden_states": "states", "encoder_attention_mask": "mask"},
            "transformer": transformer,
            "vae": {
                "factor": self.vae_factor(configs),
                "scaling_factor": vae["scaling_factor"],
                "shift_factor": vae["shift_factor"],
                "channels": int(vae["block_out_channels"][1]),
                "attention": bool(vae["mid_block_add_attention"]),
            },
            "latent_shape": list(shape),
        }

    # ---- torch

    def network_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL
        from transformers import BertModel

        from .network import PackedTransformer

        return {"transformer": PackedTransformer, "vae": AutoencoderKL, ENCODER: BertModel}

    def tokenize(self, pipe: Pipeline, prompts: list[str], sampler: Sampler) -> dict[str, dict[str, Tensor]]:
        length = sampler.tokens["bert"]
        batch = pipe["tokenizer"](prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {ENCODER: {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}}

    def encode(self, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]], sampler: Sampler) -> Conditioning:
        states = pipe[ENCODER](**inputs[ENCODER]).last_hidden_state.float()
        return Conditioning(self, {"states": states, "mask": inputs[ENCODER]["attention_mask"]}, {ENCODER: {"states": (slice(None),)}})

    def transformer_inputs(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        from .packing import grid, pack

        return {
            "hidden_states": pack(x, PATCH),
            "encoder_hidden_states": cond.tensors["states"],
            "encoder_attention_mask": cond.tensors["mask"].to(x.dtype),
            "timestep": 1 - sigma,
            "image_ids": grid(x.shape[0], x.shape[2] // PATCH, x.shape[3] // PATCH, x.device),
        }

    def velocity(self, output: Tensor, x: Tensor) -> Tensor:
        from .packing import unpack

        return -unpack(output, PATCH, x.shape[2], x.shape[3])

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        latents: Tensor = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def from_latents(self, vae: Any, latents: Tensor) -> Tensor:
        images: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return images

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return transformer.layers  # type: ignore[return-value]

    def block_features(self, output: Any, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        features: Tensor = output[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))
        return features

    def width(self, transformer: nn.Module) -> int:
        config: Any = transformer.config
        return int(config.width)

    def export_components(self, pipe: Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
        from .components import components

        return components(pipe, sampler, vae_encoder)

    def write_random(self, like: str, layers: int | None, words: Sequence[str] | None, folder: Path, seed: int) -> Sampler:
        from flashgen.models.save import save_pipeline

        from .build import build_pipeline
        from .sampling import teacher_sampler

        save_pipeline(folder, build_pipeline(self, seed, layers, words))
        return teacher_sampler()
