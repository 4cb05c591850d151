"""Guidance of a teacher as a function of the noise level: which velocities it combines, and with which weights. No networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flashgen.flow.grid import shift

Level = TypeVar("Level")  # a float or a tensor of noise levels
EDGE = 1e-6  # levels that differ by less are equal


@dataclass(frozen=True)
class Guidance:
    """v = v_u + w (v_c - v_u) + s (v_c - v_skip): classifier-free guidance and skip-layer guidance, each at some noise levels.

    w is `scale` at levels sigma with low < sigma <= high of `interval` (2404.07724), at all levels if it is None, and 1 elsewhere.
    v_skip is the velocity with the prompt and without the transformer's blocks `skip`. s is `skip_scale` at levels with
    low < sigma < high of `skip_interval`, and 0 elsewhere. Skip-layer guidance is SD3.5-Medium's, as in diffusers' pipeline.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    skip: tuple[int, ...] = ()
    skip_scale: float = 0.0
    skip_interval: tuple[float, float] = (0.0, 1.0)

    def weight(self, sigma: Level) -> Level | float:
        """w at `sigma`, a float or a tensor of any shape; a float where there is no interval."""
        if self.interval is None:
            return self.scale
        low, high = self.interval
        level: Any = sigma
        weight: Level = 1 + (self.scale - 1) * ((level > low + EDGE) & (level <= high + EDGE))
        return weight

    def skip_weight(self, sigma: Level) -> Level:
        """s at `sigma`, a float or a tensor of any shape."""
        low, high = self.skip_interval
        level: Any = sigma
        weight: Level = self.skip_scale * ((level > low + EDGE) & (level < high - EDGE))
        return weight

    def forwards(self, sigma: float) -> int:
        """Forward passes of the teacher for one velocity at `sigma`."""
        return 1 + (self.weight(sigma) != 1) + (self.skip_weight(sigma) != 0)


def levels_of_steps(start: float, stop: float, k: float) -> tuple[float, float]:
    """(lowest, highest) noise level of the steps between the shares `start` and `stop` of a trajectory on a grid of shift `k`."""
    return shift(1 - stop, k), shift(1 - start, k)


def total_forwards(guidance: Guidance, sigmas: Sequence[float]) -> int:
    """Forward passes of one guided trajectory along `sigmas`, one velocity per step."""
    return sum(guidance.forwards(sigma) for sigma in sigmas[:-1])
