"""SD3 without T5-XXL: which tokens stay, and the small T5 that may take its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.families.base import Restructuring
from flashgen.families.conditioning import Conditioning

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashgen.recipe.compression import RestructureRecipe


class WithoutT5(Restructuring):
    """`zeros` keeps T5's places in the sequence empty, `prune` removes them, `compact` has a small T5 fill them."""

    encoder = "text_encoder_3"

    def tokens_after(self, tokens: Mapping[str, int], mode: str) -> dict[str, int]:
        return {**tokens, "t5": 0} if mode == "prune" else dict(tokens)

    def pruned(self, cond: Conditioning) -> Conditioning:
        (tokens,) = cond.shares[self.encoder]["embeds"]
        return replace(cond, tensors={**cond.tensors, "embeds": cond.tensors["embeds"][:, : tokens.start]})

    def with_output(self, cond: Conditioning, output: Tensor) -> Conditioning:
        import torch

        (tokens,) = cond.shares[self.encoder]["embeds"]
        embeds = torch.cat([cond.tensors["embeds"][:, : tokens.start], output], 1)
        return replace(cond, tensors={**cond.tensors, "embeds": embeds})

    def share(self, cond: Conditioning) -> Tensor:
        (tokens,) = cond.shares[self.encoder]["embeds"]
        return cond.tensors["embeds"][:, tokens]

    def compact_encoder(self, folder: Path, config: RestructureRecipe, seed: int) -> nn.Module:
        """Token embeddings and the last norm are copied from the large T5, one tensor at a time from its files; the layers are random."""
        import torch
        from transformers import T5Config, T5EncoderModel

        from flashgen.models.stream import tensor, tensor_files

        large = T5Config.from_pretrained(folder / self.encoder, local_files_only=True)
        small = copy.deepcopy(large)
        small.num_layers = config.layers or max(1, large.num_layers // 4)
        small.num_heads = config.heads or max(1, large.num_heads // 2)
        small.d_ff = config.d_ff or max(1, large.d_ff // 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = T5EncoderModel(small).eval()  # dropout would add noise that is not the training step's own
        files = tensor_files(folder / self.encoder)
        table = next(name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in files)
        encoder.shared.weight.data.copy_(tensor(files[table], table))
        norm = "encoder.final_layer_norm.weight"
        encoder.encoder.final_layer_norm.weight.data.copy_(tensor(files[norm], norm))
        compact: nn.Module = encoder
        return compact

    def text_embedder(self, transformer: nn.Module) -> nn.Module:
        return transformer.context_embedder  # type: ignore[return-value]  # torch types attributes of modules as Tensor | Module
