"""Prompt encoding exactly as `StableDiffusion3Pipeline.encode_prompt` does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flashgen.device.tokens import warn_cut
from flashgen.models.specs import ENCODERS
from flashgen.models.stream import weight_files

LARGE = 1 << 30  # bytes of weights above which a text encoder stays on disk
BATCH = 32  # prompts encoded together; one pass over the weights on disk


@dataclass(frozen=True)
class Conditioning:
    """`embeds` [B, L_clip + L_t5, D] and `pooled` [B, P] of a batch of prompts."""

    embeds: Tensor
    pooled: Tensor

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return Conditioning(self.embeds[index], self.pooled[index])

    def without_t5(self, rows: Tensor, clip_tokens: int) -> Conditioning:
        """The same with the T5 part zeroed where `rows` [B] is true (diffusers' convention for an absent T5)."""
        embeds = self.embeds.clone()
        embeds[:, clip_tokens:] *= (~rows).to(embeds.dtype)[:, None, None]
        return Conditioning(embeds, self.pooled)


@dataclass(frozen=True)
class Tokens:
    """Token ids [B, L] of the two CLIP encoders and of T5 (None without T5)."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor | None


def is_large(folder: Path) -> bool:
    return sum(path.stat().st_size for path in weight_files(folder)) > LARGE


def stays_on_disk(pipe: StableDiffusion3Pipeline) -> bool:
    """Whether a text encoder of `pipe` does."""
    networks = [getattr(pipe, name) for name in ENCODERS]
    return any(hasattr(module, "_hf_hook") for network in networks if network is not None for module in network.modules())


def tokenize(pipe: StableDiffusion3Pipeline, prompts: list[str], t5_tokens: int) -> Tokens:
    def ids(tokenizer, length: int) -> Tensor:  # type: ignore[no-untyped-def]
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids  # type: ignore[no-any-return]

    length = pipe.tokenizer.model_max_length
    t5 = ids(pipe.tokenizer_3, t5_tokens) if pipe.text_encoder_3 is not None else None
    return Tokens(ids(pipe.tokenizer, length), ids(pipe.tokenizer_2, length), t5)


def warn_of_cuts(pipe: StableDiffusion3Pipeline, prompts: list[str], t5_tokens: int) -> None:
    """Warns about every prompt that loses its end, as `device.tokens` does."""
    length = pipe.tokenizer.model_max_length
    limits = {"tokenizer": length, "tokenizer_2": length} | ({"tokenizer_3": t5_tokens} if pipe.text_encoder_3 is not None else {})
    for name, limit in limits.items():
        for prompt, ids in zip(prompts, getattr(pipe, name)(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > limit:
                warn_cut(prompt, name, len(ids), limit)


def encode(pipe: StableDiffusion3Pipeline, tokens: Tokens, t5_tokens: int) -> Conditioning:
    """Without T5 its `t5_tokens` positions are zeros, and with `t5_tokens` 0 they are not there at all (encoder mode `prune`)."""
    clip, pooled = [], []
    for encoder, ids in ((pipe.text_encoder, tokens.clip_l), (pipe.text_encoder_2, tokens.clip_g)):
        out = encoder(ids, output_hidden_states=True)
        clip.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    width = pipe.transformer.config.joint_attention_dim
    features = torch.cat(clip, -1)
    features = torch.nn.functional.pad(features, (0, width - features.shape[-1]))
    t5 = features.new_zeros(len(features), t5_tokens, width) if tokens.t5 is None else pipe.text_encoder_3(tokens.t5)[0]
    return Conditioning(torch.cat([features, t5], 1).float(), torch.cat(pooled, -1).float())


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str], t5_tokens: int, batch: int = BATCH) -> Conditioning:
    parts = [encode(pipe, tokenize(pipe, prompts[i : i + batch], t5_tokens), t5_tokens) for i in range(0, len(prompts), batch)]
    return Conditioning(torch.cat([p.embeds for p in parts]), torch.cat([p.pooled for p in parts]))
