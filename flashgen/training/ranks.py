"""Several processes as one: `accelerate launch -m flashgen distill ...`. With one process nothing here communicates.

Each process draws the random numbers of the full batch and keeps every `world_size`-th row; gradients are averaged before the
step, and metrics before they are logged. So the number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashgen.pixels import slices
from flashgen.randomness import generator
from flashgen.runtime.processes import check_batch, join, rank, world_size

CPU = torch.device("cpu")
SIZE_STREAM = 20
BUCKET = 1 << 26  # numbers that are sent, or that an optimizer updates, together
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def buckets(tensors: Sequence[AnyTensor]) -> Iterator[list[AnyTensor]]:
    """Consecutive tensors with at most `BUCKET` numbers together; a larger one is alone."""
    bucket: list[AnyTensor] = []
    for tensor in tensors:
        if bucket and sum(other.numel() for other in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes. Gradients of sharded weights are averaged already."""
    if world_size() > 1:
        join()
        for bucket in buckets([tensor for tensor in tensors if not isinstance(tensor, DTensor)]):
            means = reduce(torch.cat([tensor.flatten() for tensor in bucket]), "mean").split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [mean.view_as(tensor) for mean, tensor in zip(means, bucket, strict=True)])


def mean_metrics(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`summarise` of micro-batches, whose metrics [] stay on their device."""
    keys = sorted({key for row in rows for key in row})
    stacked = {key: torch.stack([row[key].detach() for row in rows if key in row]) for key in keys}
    return {key: values.amin() if key.endswith("_min") else values.mean() for key, values in stacked.items()}


def broadcast_flag(flag: bool) -> bool:
    """Broadcast rank 0's flag to all ranks."""
    if world_size() == 1:
        return flag
    join()
    return bool(broadcast(torch.tensor(flag, dtype=torch.int32)))


def summarise(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it; the minimum for metrics named `*_min`."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: min(list_) if key.endswith("_min") else sum(list_) / len(list_) for key, list_ in sorted(values.items())}


def summarise_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """`summarise` over the processes; all must call it."""
    if world_size() == 1:
        return metrics
    join()
    return summarise(gather_object([metrics]))


class Draws:
    """Random numbers of one training step on `device`, a function of `key` (seed, stream, step); B = `batch` / processes.

    They come from the CPU's generator, so they are the same on every device.
    """

    def __init__(self, batch: int, *key: int, device: torch.device = CPU, part: slice = slice(None)) -> None:
        check_batch(batch)
        self.batch, self.key, self.generator, self.device, self.part = batch, key, generator(*key), device, part

    @property
    def rows(self) -> int:
        """Rows of this process, B."""
        return len(range(self.batch // world_size())[self.part])

    def micro_batches(self, size: int) -> list[Draws]:
        """The same numbers from the start, `size` rows at a time (0: all of them)."""
        return [Draws(self.batch, *self.key, device=self.device, part=part) for part in slices(self.rows, size or self.rows)]

    def one_of(self, count: int) -> int:
        """An index below `count`, the same in all processes. Draws nothing for a `count` of 1, and never changes the other numbers."""
        return int(torch.randint(count, (), generator=generator(*self.key, SIZE_STREAM))) if count > 1 else 0

    def _own(self, full: Tensor) -> Tensor:
        return full[rank() :: world_size()][self.part].to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape]."""
        return self._own(torch.randn((self.batch, *shape), generator=self.generator))

    def rand(self, *shape: int) -> Tensor:
        """Uniform in 0..1, [B, *shape]."""
        return self._own(torch.rand((self.batch, *shape), generator=self.generator))

    def randint(self, high: int) -> Tensor:
        """Integers below `high`, [B]."""
        return self._own(torch.randint(high, (self.batch,), generator=self.generator))

    def choice(self, weights: Tensor) -> Tensor:
        """Indices into `weights`, drawn in proportion to them, [B]; `weights` are on the CPU."""
        return self._own(torch.multinomial(weights, self.batch, replacement=True, generator=self.generator))
