"""Fabricating a full-size pipeline with seeded random weights, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from flashgen.artifact.files import check_disk
from flashgen.families.sd3.build import networks, scheduler, tokenizers
from flashgen.families.sd3.specs import Spec
from flashgen.families.sd3.tokenizers import COMMON_WORDS
from flashgen.models.save import write_index
from flashgen.progress import say
from flashgen.randomness import generator

SHARD_BYTES = 1 << 30
TOKENIZER_BYTES = 16 << 20  # and configs


def write_random(spec: Spec, folder: Path, seed: int, words: Sequence[str] | None = None) -> None:
    """A diffusers-layout pipeline in bf16: matrices N(0, 0.02), norm weights 1, biases 0, true position table.

    Raises MachineError, before anything is written, when the disk is too small for it.
    """
    tokens = tokenizers(spec, words or COMMON_WORDS)
    with torch.device("meta"):
        empty = networks(spec, len(tokens["tokenizer"]), len(tokens["tokenizer_3"]))
    check_disk(folder, 2 * sum(p.numel() for network in empty.values() for p in network.state_dict().values()) + TOKENIZER_BYTES)
    for number, (name, network) in enumerate(empty.items()):
        (folder / name).mkdir(parents=True)
        of_diffusers = name in ("transformer", "vae")
        (network.save_config if of_diffusers else network.config.save_pretrained)(folder / name)
        _write_shards(network, folder / name, "diffusion_pytorch_model" if of_diffusers else "model", (seed, number))
        say(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.0f} M parameters written")
    for name, part in {**tokens, "scheduler": scheduler()}.items():
        part.save_pretrained(folder / name)
        empty[name] = part
    write_index(folder, "StableDiffusion3Pipeline", empty)


def _write_shards(network: nn.Module, folder: Path, stem: str, key: tuple[int, int]) -> None:
    """The weights of `network`, which is on `meta`, made and written one shard at a time."""
    tied = set(getattr(network, "_tied_weights_keys", None) or ())
    empty = {name: meta for name, meta in network.state_dict().items() if meta.is_floating_point()}
    number = {name: position for position, name in enumerate(network.state_dict())}
    halves = {name: meta.to(torch.bfloat16) for name, meta in empty.items() if name not in tied}
    split = split_torch_state_dict_into_shards(halves, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: _weight(network, name, halves[name], (*key, number[name])) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _weight(network: nn.Module, name: str, meta: Tensor, key: tuple[int, ...]) -> Tensor:
    if name == "pos_embed.pos_embed":
        return _position_table(network)
    if meta.ndim > 1:
        return torch.empty(meta.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator(*key))
    return torch.full(meta.shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)


def _position_table(network: nn.Module) -> Tensor:
    embed: Any = network.pos_embed
    table = get_2d_sincos_pos_embed(
        embed.proj.out_channels,
        embed.pos_embed_max_size,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )
    return table.unsqueeze(0).to(torch.bfloat16)  # type: ignore[no-any-return]  # diffusers types it as numpy too
