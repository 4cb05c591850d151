"""Fabricating a full-size pipeline with seeded random weights, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from flashgen.artifact.store import check_disk
from flashgen.models.build import SHIFT, clip_config, t5_config
from flashgen.models.specs import Spec
from flashgen.models.tokenizers import clip_tokenizer, t5_tokenizer
from flashgen.progress import say
from flashgen.randomness import generator

SHARD_BYTES = 1 << 30
TOKENIZER_BYTES = 16 << 20  # and configs


def write_random(spec: Spec, folder: Path, seed: int) -> None:
    """A diffusers-layout pipeline in bf16: matrices N(0, 0.02), norm weights 1, biases 0, true position table.

    Raises MachineError, before anything is written, when the disk is too small for it.
    """
    clip_tok, t5_tok = clip_tokenizer(spec.clip_tokens), t5_tokenizer(spec.t5_tokens)
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "transformer": SD3Transformer2DModel(**spec.transformer),
            "vae": AutoencoderKL(**spec.vae),
            "text_encoder": CLIPTextModelWithProjection(clip_config(spec.clip_l, len(clip_tok))),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(spec.clip_g, len(clip_tok))),
            "text_encoder_3": T5EncoderModel(t5_config(spec.t5, len(t5_tok))),
        }
    check_disk(folder, 2 * sum(p.numel() for network in networks.values() for p in network.state_dict().values()) + TOKENIZER_BYTES)
    for number, (name, network) in enumerate(networks.items()):
        stem = "diffusion_pytorch_model" if name in ("transformer", "vae") else "model"
        (folder / name).mkdir(parents=True)
        if stem == "model":
            network.config.save_pretrained(folder / name)  # type: ignore[union-attr, operator]
        else:
            network.save_config(folder / name)  # type: ignore[operator]
        _write_shards(network, folder / name, stem, (seed, number))
        say(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.0f} M parameters written")
    for name, tokenizer in (("tokenizer", clip_tok), ("tokenizer_2", clip_tok), ("tokenizer_3", t5_tok)):
        tokenizer.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(), indent=2) + "\n")


def _write_shards(network: nn.Module, folder: Path, stem: str, key: tuple[int, int]) -> None:
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0
    for name, tensor in _tensors(network, key):
        if size + tensor.nbytes > SHARD_BYTES and shard:
            _flush(shard, shards, folder, stem)
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    _flush(shard, shards, folder, stem)
    count = len(shards)
    names = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, name in enumerate(names):
        (folder / f"part{number}").rename(folder / name)
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _flush(shard: dict[str, Tensor], shards: list[list[str]], folder: Path, stem: str) -> None:
    save_file(shard, folder / f"part{len(shards)}", metadata={"format": "pt"})
    shards.append(list(shard))
    shard.clear()


def _tensors(network: nn.Module, key: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    shared = set(getattr(network, "_tied_weights_keys", None) or ())
    for number, (name, meta) in enumerate(network.state_dict().items()):
        if name in shared:
            continue
        if name == "pos_embed.pos_embed":
            yield name, _position_table(network)
        elif meta.ndim > 1:
            yield name, torch.empty(meta.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator(*key, number))
        elif meta.is_floating_point():
            yield name, torch.full(meta.shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)


def _position_table(network: nn.Module) -> Tensor:
    embed: Any = network.pos_embed
    table = get_2d_sincos_pos_embed(
        embed.proj.out_channels,
        embed.pos_embed_max_size,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )
    return table.unsqueeze(0).to(torch.bfloat16)  # type: ignore[no-any-return]


def _index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
