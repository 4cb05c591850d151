"""Several processes as one: `accelerate launch -m flashgen distill ...`. Alone, everything here costs nothing.

Each process draws the random numbers of the whole batch and keeps every `world`-th row, gradients are averaged before the
step, and metrics before they are logged. So the number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashgen.processes import check_batch, join, rank, world
from flashgen.randomness import generator


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes; gradients of sharded weights are that already."""
    if world() > 1:
        join()
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                tensor.copy_(reduce(tensor, "mean"))


def first_says(flag: bool) -> bool:
    """What the first process says, in all of them."""
    if world() == 1:
        return flag
    join()
    return bool(broadcast(torch.tensor(flag, dtype=torch.int32)))


def summary(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric the mean over the rows that have it, of one that is named `*_min` the least."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {key: min(values) if key.endswith("_min") else sum(values) / len(values) for key, values in sorted(found.items())}


def summary_of_all(metrics: dict[str, float]) -> dict[str, float]:
    """`summary` over the processes; all must call it."""
    if world() == 1:
        return metrics
    join()
    return summary(gather_object([metrics]))


class Draws:
    """Random numbers of one training step, a function of `key` (seed, stream, step); rows = `batch` / processes."""

    def __init__(self, batch: int, *key: int) -> None:
        check_batch(batch)
        self.batch, self.whole = batch, generator(*key)

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn[rank() :: world()]

    def randn(self, *shape: int) -> Tensor:
        """[rows, *shape]"""
        return self._own(torch.randn((self.batch, *shape), generator=self.whole))

    def rand(self, *shape: int) -> Tensor:
        """[rows, *shape] in 0..1"""
        return self._own(torch.rand((self.batch, *shape), generator=self.whole))

    def randint(self, high: int) -> Tensor:
        """[rows]"""
        return self._own(torch.randint(high, (self.batch,), generator=self.whole))

    def choice(self, weights: Tensor) -> Tensor:
        """[rows] of indices, in proportion to `weights`."""
        return self._own(torch.multinomial(weights, self.batch, replacement=True, generator=self.whole))
