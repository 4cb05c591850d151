"""Names of the tensors of diffusers' SD3Transformer2DModel in SD3's original checkpoints.

There queries, keys and values are one matrix, and where adaLN has two parts, shift comes before scale. Source: Stability AI's sd3.5
(mmditx.py); this is the inverse of diffusers' convert_sd3_transformer_checkpoint_to_diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from flashgen.errors import ArtifactError
from flashgen.families.base import OriginalTensor

PREFIX = "model.diffusion_model."
NETWORK = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    **{f"attn.to_{part}": "x_block.attn.qkv" for part in "qkv"},
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    **{f"attn2.to_{part}": "x_block.attn2.qkv" for part in "qkv"},
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    **{f"attn.add_{part}_proj": "context_block.attn.qkv" for part in "qkv"},
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
ORDER = {stem: place for place, stem in enumerate((*NETWORK, *BLOCK))}
NAME = re.compile(r"(?:transformer_blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


def originals(names: Iterable[str]) -> list[OriginalTensor]:
    """Every tensor of the original checkpoint for the `names` of a diffusers state dict. Raises ArtifactError for an unknown name."""
    parts: dict[str, list[str]] = {}
    swapped = set()
    split = {name: _split(name) for name in names}
    last = max(block for block, _, _ in split.values())
    for name, (block, stem, suffix) in sorted(split.items(), key=lambda item: (item[1][0], ORDER[item[1][1]], item[1][2])):
        original = PREFIX + (NETWORK[stem] if block < 0 else f"joint_blocks.{block}.{BLOCK[stem]}") + suffix
        parts.setdefault(original, []).append(name)
        if stem == "norm_out.linear" or (stem == "norm1_context.linear" and block == last):  # the last block only reads its text
            swapped.add(original)
    return [OriginalTensor(name, tuple(members), name in swapped) for name, members in parts.items()]


def _split(name: str) -> tuple[int, str, str]:
    """(block, -1 outside of blocks; name inside the block or network; `.weight`, `.bias` or "")"""
    match = NAME.fullmatch(name)
    assert match is not None
    block, stem, suffix = match.groups()
    if stem not in (NETWORK if block is None else BLOCK):
        raise ArtifactError(f"SD3's checkpoints have no name for {name}; leave out --target gguf, or report it as a bug")
    return int(block or -1), stem, suffix or ""
