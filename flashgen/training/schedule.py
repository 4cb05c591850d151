"""Learning rates as functions of the step: shares of the rates with which optimizers were created."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer


def cosine(step: int, steps: int, *, warmup: int, floor: float) -> float:
    """Linear warm-up, then cosine decay to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def hold_then_decay(step: int, steps: int, *, warmup: int, decay_share: float, floor: float) -> float:
    """Linear warm-up, constant, then linear decay to `floor` over the last `decay_share` of the steps."""
    left = (steps - step) / max(1.0, decay_share * steps)
    return min(1.0, (step + 1) / warmup, floor + (1 - floor) * left)


def set_rates(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every learning rate to `share` of the one with which its optimizer was created."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share
