"""Randomness is a function of (seed, stream, step), so a resumed run equals an uninterrupted one."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """Torch randomness that depends on `key` (seed, stream, step) alone, so a resumed run repeats it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
