"""Initial noise: Philox-4x32-10 and Box-Muller in the element order of `torch.randn(..., device="cuda")`.

Element i of a tensor uses counter (offset 0, 0, i, 0) and key (seed low, seed high). The first two of the four outputs give one normal
number, as in curand for tensors of at most one CUDA grid. Arithmetic is float64, rounded once to float32, so that the numbers are the
same in every language; a GPU computes in float32, and its numbers differ by that rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = np.uint64(0xFFFFFFFF)
TWO_POW32_INV = 2.0**-32


def philox(index: NDArray[np.uint64], seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first two 32-bit outputs of Philox-4x32-10 for every element index."""
    zero = np.zeros_like(index)
    c0, c1, c2, c3 = zero, zero, index & MASK, index >> np.uint64(32)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(low),
            p1 & MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(high),
            p0 & MASK,
        )
        low, high = (low + WEYL[0]) & 0xFFFFFFFF, (high + WEYL[1]) & 0xFFFFFFFF
    return c0, c1


def randn(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Standard normal float32 of `shape` for a `seed` in 0..2^64-1."""
    x, y = philox(np.arange(int(np.prod(shape)), dtype=np.uint64), seed)
    u, v = (x + 0.5) * TWO_POW32_INV, (y + 0.5) * TWO_POW32_INV
    normal = np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v)
    return np.asarray(normal, np.float32).reshape(shape)


def latents(shape: tuple[int, ...], seeds: list[int]) -> NDArray[np.float32]:
    """Initial noise [len(seeds), *shape]; picture i depends on seeds[i] alone, not on its place in the batch."""
    return np.stack([randn(shape, seed) for seed in seeds])
