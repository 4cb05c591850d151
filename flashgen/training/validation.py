"""Validation while a network trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from flashgen.runtime.processes import from_first
from flashgen.training.ema import Ema

Validate = Callable[[str, nn.Module], float | None]  # (name of the moment, network) -> its score, None where nothing judges


@dataclass(frozen=True)
class Validation:
    """Validation of the averaged weights of the training `name`, after every `every` of its `steps` steps and the last one; 0: never."""

    validate: Validate | None
    name: str
    steps: int
    every: int

    def after(self, step: int, ema: Ema, network: nn.Module) -> dict[str, float]:
        """{"score": score} after step number `step`, {} where none is due or nothing judges. `network` is left as it was."""
        if self.validate is None or not self.every or ((step + 1) % self.every and step + 1 < self.steps):
            return {}
        with ema.applied_to(network):
            own = self.validate(f"{self.name}-{step + 1:06d}", network)
        score = from_first(lambda: own)  # all processes choose the same weights
        return {} if score is None else {"score": score}
