"""Averages of a network's weights, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.training.shards import shard_like


class Ema:
    """Exponential moving average of a module's parameters (buffers are shared, not averaged).

    Averages lie beside the parameters, or with `offload` in the CPU's memory: 4 bytes per weight less on an accelerator.
    """

    def __init__(self, module: nn.Module, decay: float, offload: bool = False) -> None:
        self.decay, self.offload = decay, offload
        self.shadow = {k: self._kept(p).clone() for k, p in module.named_parameters()}

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if self.offload else tensor.detach()

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """shadow <- d shadow + (1 - d) weights, d = min(decay, (1 + step) / (10 + step)) so that early steps count."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if not self.offload:
            torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in module.parameters()], 1 - decay)
            return
        for average, p in zip(self.shadow.values(), module.parameters(), strict=True):  # one copy in the CPU's memory at a time
            average.lerp_(self._kept(p), 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the averaged weights."""
        _copy(self.shadow, module)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Give `module` the averaged weights inside, and its own again afterwards."""
        weights = {key: self._kept(p).clone() for key, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            _copy(weights, module)

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name; a checkpoint is loaded into them."""
        return {**self.shadow}


class BestWeights:
    """The averaged weights with the highest score so far; the earliest ones win a tie."""

    def __init__(self, ema: Ema) -> None:
        self.ema, self.score, self.step, self.shadow = ema, -math.inf, 0, dict[str, Tensor]()
        self.last = -math.inf

    def offer(self, score: float, step: int) -> None:
        """Keep a copy of the average after `step` steps, 1 or more, if its score is the highest."""
        self.last = score
        if score > self.score:
            self.score, self.step = score, step
            self.shadow = {k: v.clone() for k, v in self.ema.shadow.items()}

    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the best weights."""
        _copy(self.shadow, module)

    def state_dict(self) -> dict[str, Any]:
        """Best score, its step and weights, and the last score."""
        return {"score": self.score, "step": self.step, "last": self.last} | {f"shadow.{k}": v for k, v in self.shadow.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the numbers of `state_dict()`. A checkpoint is loaded into the weights, which are anything until then."""
        self.score, self.step, self.last = state["score"], state["step"], state["last"]
        self.shadow = {k: torch.empty_like(v) for k, v in self.ema.shadow.items()} if self.step else {}


@torch.no_grad()
def _copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    for key, parameter in module.named_parameters():
        parameter.copy_(shard_like(weights[key], parameter))
