"""Randomness is a function of (seed, stream, step), so a resumed run equals an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """Torch generator whose numbers depend on `key` (seed, stream, step) alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start torch's global generator from `seed` inside, and restore it afterwards: for initialisers that take no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
