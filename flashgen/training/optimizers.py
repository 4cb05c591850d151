"""Optimizers of a whole transformer."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [B, m, n] with their singular values brought near 1, .5 to 1.5: the quintic Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    found: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if wide is not matrices else found


class Muon(torch.optim.Muon):
    """torch's with Nesterov's momentum, but the matrices of one shape are orthogonalised together, and in their own type.

    torch's does it one by one in bf16, which processors without bf16 emulate: there a step of the shapes world's transformer takes
    17 to 30 times as long as this one (docs/lab-log.md). `nesterov` and `adjust_lr_fn` stay at their defaults.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may evaluate the loss again
        for group in self.param_groups:
            lr, momentum, alike = group["lr"], group["momentum"], defaultdict[torch.Size, list[tuple[nn.Parameter, Tensor]]](list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                held = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                alike[p.shape].append((p, p.grad.lerp(held, momentum)))
            for (rows, columns), pairs in alike.items():
                ahead = torch.stack([update for _, update in pairs])
                updates = orthogonalise(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


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
    return [Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95), adamw] if matrices else [adamw]


def named(prefix: str, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    """By kind, for checkpoints: `{prefix}muon`, `{prefix}adamw`."""
    return {f"{prefix}{type(optimizer).__name__.lower()}": optimizer for optimizer in optimizers}
