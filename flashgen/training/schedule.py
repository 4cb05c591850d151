"""Learning rates as functions of the step."""

from __future__ import annotations

import math


def cosine(lr: float, step: int, steps: int, *, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine decay to floor * lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def hold_then_decay(lr: float, step: int, steps: int, *, warmup: int, decay_share: float, floor: float = 0.02) -> float:
    """Linear warm-up, constant, then linear decay to floor * lr over the last `decay_share` of the steps."""
    left = (steps - step) / max(1.0, decay_share * steps)
    return lr * min(1.0, (step + 1) / warmup, floor + (1 - floor) * left)
