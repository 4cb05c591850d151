"""Conditioning of a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.families.base import Family

Index = tuple[slice, ...]  # a part of a tensor, behind its batch axis


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch of prompts: named tensors [B, ...] that only their family understands.

    `shares` says where the output of each text encoder lies: {encoder: {tensor name: index behind the batch axis}}.
    """

    family: Family
    tensors: Mapping[str, Tensor]
    shares: Mapping[str, Mapping[str, Index]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        """Conditioning of the prompts at `rows`."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Conditioning with `function` applied to every tensor."""
        return replace(self, tensors={name: function(tensor) for name, tensor in self.tensors.items()})

    def to(self, target: Any) -> Conditioning:
        """Conditioning on another device, or with floating-point tensors in another dtype (masks keep theirs)."""
        import torch

        floats_only = isinstance(target, torch.dtype)
        return self.map(lambda tensor: tensor if floats_only and not tensor.is_floating_point() else tensor.to(target))

    def expand(self, rows: int) -> Conditioning:
        """`rows` views of a single prompt's conditioning."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def drop(self, encoder: str, rows: Tensor) -> Conditioning:
        """Conditioning with the share of `encoder` set to zero where `rows` (bool [B]) is true."""
        changed = dict(self.tensors)
        for name, index in self.shares[encoder].items():
            tensor = changed[name].clone()
            part = tensor[(slice(None), *index)]
            part.masked_fill_(rows.reshape(-1, *[1] * (part.ndim - 1)), 0)
            changed[name] = tensor
        return replace(self, tensors=changed)

    def has(self, encoder: str) -> Tensor:
        """bool [B]: true where any number in the share of `encoder` is not zero."""
        nonzero = [self.tensors[name][(slice(None), *index)].flatten(1).any(1) for name, index in self.shares[encoder].items()]
        result: Tensor = sum(nonzero[1:], nonzero[0])
        return result


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all `parts`, in order."""
    import torch

    return replace(parts[0], tensors={name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
