"""adaLN modulation on a basis that all blocks share: their input is one vector a sample, and a few-step student knows few of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.models.networks import linears_of

MODULATION = re.compile(r"transformer_blocks\.\d+\.norm\w*\.linear$")


class Factored(nn.Module):
    """up(x basis), where a Linear was: `basis` [K, r] is one tensor for the whole network, `up` is Linear(r, N)."""

    def __init__(self, basis: nn.Parameter, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.basis = basis
        self.up = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, device="meta")
        self.up.weight = nn.Parameter(up, requires_grad=False)
        if bias is not None:
            self.up.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x @ self.basis)
        return out


def modulations(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The adaLN Linears of all blocks by name; each takes silu(time and pooled text embedding), the same one."""
    return {name: layer for name, layer in linears_of(transformer).items() if MODULATION.search(name)}


def put(transformer: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(transformer.get_submodule(parent), own, layer)


def factor(transformer: nn.Module, basis: Tensor, ups: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> None:
    """Replace the Linears that `ups` names by their factors, in place, `basis` being [K, r]; biases stay unless given."""
    shared = nn.Parameter(basis, requires_grad=False)
    for name, up in ups.items():
        layer: Any = transformer.get_submodule(name)
        bias = biases[name] if biases is not None else layer.bias
        put(transformer, name, Factored(shared, up, bias))


@torch.no_grad()
def shared_basis(weights: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(down [K, K], columns [K, K], mean [K]): basis = down[:, :r], and W V with V = columns[:, :r] is the `up` of a weight W [N, K].

    For each r it is the best rank-r factorisation with one basis of all outputs W (x - mean) at once in squares over `inputs`
    [M, K] (Eckart-Young on W C^1/2, the weights stacked; C the covariance of the inputs). float64 inside.
    """
    x = inputs.double()
    mean = x.mean(0)
    values, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    scale = values.clamp_min(values.max() * 1e-12).sqrt()
    root, inverse = axes * scale, axes / scale
    gram = torch.zeros_like(root)
    for weight in weights:
        reached = weight.double() @ root
        gram += reached.T @ reached
    _, turned = torch.linalg.eigh(gram)
    turned = turned.flip(1)
    down, columns = inverse @ turned, root @ turned
    length = down.norm(dim=0)  # of 1, so that fp16 holds them
    return down / length, columns * length, mean
