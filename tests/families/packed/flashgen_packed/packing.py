"""Latents as tokens, in the order of a description (`flashgen.families.graphs`): rows of squares, channel-major within a square."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor, patch: int) -> Tensor:
    """Tokens [B, (h/p)(w/p), C p p] of latents [B, C, h, w]."""
    count, channels, height, width = x.shape
    cut = x.reshape(count, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Latents [B, C, h, w] of tokens [B, (h/p)(w/p), C p p]."""
    cut = tokens.reshape(tokens.shape[0], height // patch, width // patch, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid(count: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of every token, int64 [B, L, 2]."""
    down, across = torch.arange(rows, device=device), torch.arange(columns, device=device)
    ids = torch.stack([down[:, None].expand(rows, columns), across[None].expand(rows, columns)], -1)
    return ids.flatten(0, 1)[None].expand(count, rows * columns, 2)
