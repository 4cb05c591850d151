"""Optimizers of a whole transformer."""

from __future__ import annotations

import torch
from torch import nn


def muon_and_adamw(
    transformer: nn.Module, muon_lr: float, adam_lr: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside blocks, AdamW on embedders, biases, norms and the output projection; decay is Muon's.

    With `muon_lr` 0 AdamW takes everything, and the list holds AdamW alone.
    """
    inside = {name for name, p in transformer.named_parameters() if muon_lr and "transformer_blocks" in name and p.ndim == 2}
    matrices = [p for name, p in transformer.named_parameters() if name in inside]
    others = [p for name, p in transformer.named_parameters() if name not in inside]
    adamw = torch.optim.AdamW(others, lr=adam_lr, betas=betas, weight_decay=0.0)
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95), adamw] if matrices else [adamw]


def named(prefix: str, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    """By kind, for checkpoints: `{prefix}muon`, `{prefix}adamw`."""
    return {f"{prefix}{type(optimizer).__name__.lower()}": optimizer for optimizer in optimizers}
