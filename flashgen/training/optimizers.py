"""Muon for the matrices of a transformer's blocks, AdamW for everything else, without a first moment where beta1 is 0."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.recipe.base import Training
from flashgen.training.ranks import buckets
from flashgen.training.shards import full, shard_like


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [B, m, n] with their singular values moved to 0.5..1.5: the quintic Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x


class Muon(torch.optim.Muon):
    """torch's Muon with Nesterov momentum, but matrices of one shape are orthogonalised together, and in their own dtype.

    torch's does it one by one in bf16, which processors without bf16 emulate: there a step of the shapes world's transformer takes
    17 to 30 times as long as this one (docs/lab-log.md). `nesterov` and `adjust_lr_fn` stay at their defaults. Of sharded matrices each
    process orthogonalises all.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may evaluate the loss again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], defaultdict[torch.Size, list[tuple[nn.Parameter, Tensor]]](list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                by_shape[p.shape].append((p, full(p.grad.lerp(average, momentum))))
            for (rows, columns), pairs in by_shape.items():
                stacked = torch.stack([update for _, update in pairs])
                updates = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(shard_like(update, p), alpha=-lr * math.sqrt(max(1, rows / columns)))


class AdamWithoutMomentum(torch.optim.Optimizer):
    """Adam with beta1 = 0, whose first moment is the gradient and is not stored: 4 bytes per weight instead of 8.

    Parameters are updated a few at a time, so a step needs memory for temporaries of `ranks.BUCKET` numbers, not of all weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, beta: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may evaluate the loss again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for chunk in buckets([p for p in group["params"] if p.grad is not None]):
                self._update(chunk, [p.grad for p in chunk if p.grad is not None], group)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p] |= {"step": torch.zeros(()), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(squares, group["beta"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta"])
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, [math.sqrt(1 - group["beta"] ** int(self.state[p]["step"])) for p in parameters])
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(parameters, gradients, scales, -group["lr"])


def muon_and_adamw(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    config: Training,
    *,
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.0,
    bits: int = 32,
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of `network` that lie in its `blocks`, AdamW on all other parameters; `weight_decay` is Muon's alone.

    An optimizer without parameters is left out: Muon with `muon_lr` 0 or without blocks, AdamW where every parameter is such a matrix.
    `bits` are those of AdamW's moments, 32 or 8; Muon's momentum stays in 32.
    """
    inside = {id(p) for block in blocks for p in block.parameters() if muon_lr and p.ndim == 2}
    matrices = [p for p in network.parameters() if id(p) in inside]
    others = [p for p in network.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=config.muon_momentum))
    if others:
        optimizers.append(adam(others, lr, config.betas, bits))
    return optimizers


def adam(parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], bits: int = 32) -> torch.optim.Optimizer:
    """AdamW without weight decay; fused on GPUs, and without a stored first moment where beta1 is 0.

    With 8 `bits` bitsandbytes' AdamW8bit, which always stores both moments, and those of tensors below 4096 numbers in 32 bits.
    """
    if bits == 8:
        import bitsandbytes

        library: Any = bitsandbytes  # its functions have no types
        optimizer: torch.optim.Optimizer = library.optim.AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=0.0)
        return optimizer
    if betas[0] == 0:
        return AdamWithoutMomentum(parameters, lr, betas[1])
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=parameters[0].device.type == "cuda" or None)


def named(prefix: str, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by kind, for checkpoints: `{prefix}muon`, `{prefix}adamw`."""
    return {f"{prefix}{'muon' if isinstance(optimizer, Muon) else 'adamw'}": optimizer for optimizer in optimizers}
