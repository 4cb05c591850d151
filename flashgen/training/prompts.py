"""Prompt pools: encoded once, so that no text encoder is resident while a transformer trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flashgen.models.text import BATCH, Conditioning, encode_prompts, stays_on_disk
from flashgen.processes import rank, wait_for_all, world
from flashgen.progress import track
from flashgen.shapes.scene import sample_request
from flashgen.training.ranks import Draws


@dataclass(frozen=True)
class PromptPool:
    """`cond` of N prompts, `empty` of the empty prompt (one row), where the T5 tokens begin, and which rows have none, bool [N].

    `cond` may be mapped from a file: `pool[rows]` reads those rows alone.
    """

    cond: Conditioning
    empty: Conditioning
    clip_tokens: int
    dropped: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cond.pooled)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        cond = self.cond[rows]
        return cond if self.dropped is None else cond.without_t5(self.dropped[rows], self.clip_tokens)

    def first(self, count: int) -> PromptPool:
        """The first `count` prompts."""
        return replace(self, cond=self.cond[slice(count)], dropped=None if self.dropped is None else self.dropped[:count])

    def dropping_t5(self, share: float, g: torch.Generator) -> PromptPool:
        """The same prompts, a random `share` of them without its T5 part for good."""
        drawn = torch.rand(len(self), generator=g) < share
        return replace(self, dropped=drawn if self.dropped is None else drawn | self.dropped)

    def draw(self, t5_drop: float, g: Draws) -> Conditioning:
        """Random prompts, each without its T5 part with probability `t5_drop`."""
        rows = g.randint(len(self))
        return self[rows].without_t5(g.rand() < t5_drop, self.clip_tokens)

    def empty_for(self, cond: Conditioning) -> Conditioning:
        """The empty prompt for each row of `cond`, without its T5 part where that has none: as a pipeline without T5 guides itself."""
        rows = len(cond.pooled)
        empty = Conditioning(self.empty.embeds.expand(rows, -1, -1), self.empty.pooled.expand(rows, -1))
        return empty.without_t5(~cond.embeds[:, self.clip_tokens :].flatten(1).any(1), self.clip_tokens)


def training_captions(count: int, seed: int, own: Sequence[str] | None = None) -> list[str]:
    """`count` prompts for training: of `own` in random order, each as often as the others, or of the shapes world.

    Evaluation uses `scene.prompt_set`, another random stream.
    """
    rng = np.random.default_rng([seed, 0x7EA1])
    if own is None:
        return [sample_request(rng).caption() for _ in range(count)]
    order = np.concatenate([rng.permutation(len(own)) for _ in range(-(-count // len(own)))])
    return [own[i] for i in order[:count]]


def prompt_pool(
    pipe: StableDiffusion3Pipeline, count: int, seed: int, t5_tokens: int, work: Path | None = None, own: Sequence[str] | None = None
) -> PromptPool:
    """Embeddings of `count` training prompts and of the empty one; with `work` they are kept there and mapped, not held."""
    prompts = [*training_captions(count, seed, own), ""]
    cond = encode_prompts(pipe, prompts, t5_tokens) if work is None else _kept(pipe, prompts, t5_tokens, work / f"prompts-{seed}")
    return PromptPool(cond[slice(count)], cond[slice(count, None)], pipe.tokenizer.model_max_length)


def _kept(pipe: StableDiffusion3Pipeline, prompts: list[str], t5_tokens: int, folder: Path) -> Conditioning:
    """`encode_prompts` as files in `folder`, shared out over the processes; a resumed run encodes the parts that are missing.

    In bf16 where an encoder computes in it, else in fp32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if stays_on_disk(pipe) else torch.float32
    wide = pipe.transformer.config
    embeds = (len(prompts), pipe.tokenizer.model_max_length + t5_tokens, wide.joint_attention_dim)
    shapes = {"embeds": embeds, "pooled": (len(prompts), wide.pooled_projection_dim)}
    kept = Conditioning(
        **{
            name: torch.from_file(str(folder / name), shared=True, size=torch.Size(shape).numel(), dtype=dtype).reshape(shape)
            for name, shape in shapes.items()
        }
    )
    starts = range(0, len(prompts), BATCH)
    own = [start for start in starts[rank() :: world()] if not (folder / f"{start:06d}.done").exists()]
    for start in track(own, "embed prompts", total=len(own)):
        rows = slice(start, start + BATCH)
        part = encode_prompts(pipe, prompts[rows], t5_tokens)
        kept.embeds[rows], kept.pooled[rows] = part.embeds, part.pooled
        (folder / f"{start:06d}.done").touch()
    wait_for_all()
    return kept
