"""Decoding large latents in overlapping tiles, so that memory grows with the tile and not with the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashgen.pixels import Floats


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First indices of tiles that cover `length` with at least `overlap` between neighbours; the last tile ends at the end."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(tile: int, overlap: int, before: bool, after: bool) -> Floats:
    """Weights of a tile along one axis: they rise and fall over `overlap` on the sides that have a neighbour."""
    rise = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap
    weights = np.ones(tile, np.float32)
    if before:
        weights[:overlap] = rise
    if after:
        weights[tile - overlap :] = np.minimum(weights[tile - overlap :], rise[::-1])
    return weights


def decode_tiled(decode: Callable[[Floats], Floats], z: Floats, tile: int, factor: int) -> Floats:
    """Pictures [B, 3, h factor, w factor] of latents `z` [B, C, h, w], decoded in tiles of at most `tile` latents a side.

    Neighbours share a quarter of a tile and are blended linearly (diffusers' `AutoencoderKL.tiled_decode`). The result differs from
    that of one pass where the decoder uses the whole picture: in group norms and attention.
    """
    rows, _, height, width = z.shape
    overlap = max(1, tile // 4)
    tops, lefts = starts(height, tile, overlap), starts(width, tile, overlap)
    out = np.zeros((rows, 3, height * factor, width * factor), np.float32)
    total = np.zeros(out.shape[2:], np.float32)
    for top in tops:
        for left in lefts:
            part = decode(z[:, :, top : top + tile, left : left + tile])
            sides = [
                ramp(size, min(overlap * factor, size), begin > 0, begin * factor + size < full)
                for size, begin, full in ((part.shape[2], top, out.shape[2]), (part.shape[3], left, out.shape[3]))
            ]
            weights = np.outer(*sides)
            area = (slice(top * factor, top * factor + part.shape[2]), slice(left * factor, left * factor + part.shape[3]))
            out[:, :, *area] += part * weights
            total[area] += weights
    return np.asarray(out / total)
