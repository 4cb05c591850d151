"""Prompt pools: encoded once, so that no text encoder is resident while a transformer trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from flashgen.models.text import Conditioning, encode_prompts
from flashgen.shapes.scene import sample_request
from flashgen.training.ranks import Draws


@dataclass(frozen=True)
class PromptPool:
    """`cond` of N prompts, `empty` of the empty prompt (one row), and where the T5 tokens begin."""

    cond: Conditioning
    empty: Conditioning
    clip_tokens: int

    def __len__(self) -> int:
        return len(self.cond.pooled)

    def dropping_t5(self, share: float, g: torch.Generator) -> PromptPool:
        """The same prompts, a random `share` of them without its T5 part for good."""
        return replace(self, cond=self.cond.without_t5(torch.rand(len(self), generator=g) < share, self.clip_tokens))

    def draw(self, t5_drop: float, g: Draws) -> Conditioning:
        """Random prompts, each without its T5 part with probability `t5_drop`."""
        rows = g.randint(len(self))
        return self.cond[rows].without_t5(g.rand() < t5_drop, self.clip_tokens)

    def empty_rows(self, batch: int) -> Conditioning:
        return Conditioning(self.empty.embeds.expand(batch, -1, -1), self.empty.pooled.expand(batch, -1))


def training_captions(count: int, seed: int) -> list[str]:
    """Prompts of the shapes world for training; evaluation uses `scene.prompt_set`, another random stream."""
    rng = np.random.default_rng([seed, 0x7EA1])
    return [sample_request(rng).caption() for _ in range(count)]


def prompt_pool(pipe: StableDiffusion3Pipeline, count: int, seed: int, t5_tokens: int) -> PromptPool:
    cond = encode_prompts(pipe, training_captions(count, seed), t5_tokens)
    return PromptPool(cond, encode_prompts(pipe, [""], t5_tokens), pipe.tokenizer.model_max_length)
