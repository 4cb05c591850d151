"""Real pictures for the adversarial term: latents on the disk, each with the prompt that describes its picture."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashgen.training.cache import SHARD, write_states
from flashgen.training.mapped import release
from flashgen.training.prompts import PromptPool


@dataclass(frozen=True)
class RealPictures:
    """fp16 `latents` [M, C, h, w], mapped by `mappings`; those at `rows` [N] belong to the N prompts of `pool`, in this order."""

    latents: Tensor
    rows: Tensor
    pool: PromptPool
    mappings: tuple[mmap.mmap, ...] = ()

    def pictures(self, rows: Tensor) -> Tensor:
        """Latents [B, C, h, w] of the pictures with the prompts `rows` [B], in fp32 on the pool's device."""
        latents = self.latents[self.rows[rows.cpu()]]
        release(*self.mappings)
        return self.pool.placed(latents).float()


@torch.no_grad()
def write_latents(
    latent: Callable[[int], Tensor | None], count: int, shape: tuple[int, ...], folder: Path
) -> tuple[Tensor, Tensor, tuple[mmap.mmap, ...]]:
    """(fp16 latents [count, *shape] mapped from `folder`, rows that have one, mappings).

    `latent(row)` gives [*shape], or None for a row without a picture, which holds NaN. Rows that `folder` has are not computed again.
    """
    missing = torch.full(shape, torch.nan)

    def compute(rows: slice) -> list[list[Tensor]]:
        found = (latent(row) for row in range(rows.start, rows.stop))
        return [[torch.stack([missing if z is None or not z.isfinite().all() else z.float().cpu() for z in found])]]

    (states,), mappings = write_states(folder, {"latents.bin": 1}, count, shape, SHARD, compute, "pictures")
    rows = states.flatten(1)[:, 0].isfinite().nonzero().flatten()
    release(*mappings)
    return states[:, 0], rows, mappings
