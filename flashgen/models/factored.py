"""adaLN modulation on a low-rank basis that all blocks share: adaLN reads one vector per picture, and these vectors span few directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.families.base import Family
from flashgen.models.networks import linears_of


class SharedLowRank(nn.Module):
    """up(x basis) in place of a Linear: `basis` [K, r] is one tensor for the whole network, `up` is Linear(r, N)."""

    def __init__(self, basis: nn.Parameter, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.basis = basis
        self.up = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, device="meta")
        self.up.weight = nn.Parameter(up, requires_grad=False)
        if bias is not None:
            self.up.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        out: Tensor = self.up(x @ self.basis)
        return out


def modulations(transformer: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """The adaLN Linears of all blocks by name, which all read the same vector; empty for a family without them."""
    pattern = family.modulation
    return {name: layer for name, layer in linears_of(transformer).items() if pattern is not None and pattern.search(name)}


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in place of the submodule `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, layer)


def factor(transformer: nn.Module, basis: Tensor, ups: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> None:
    """Replace the Linears that `ups` names by factors on `basis` [K, r], in place; they keep their biases unless others are given."""
    device = next(transformer.parameters()).device
    if device.type != "meta":  # as it is for a network that reads its weights when it runs
        basis = basis.to(device)
    shared = nn.Parameter(basis, requires_grad=False)
    for name, up in ups.items():
        layer: Any = transformer.get_submodule(name)
        bias = biases[name] if biases is not None else layer.bias
        replace_layer(transformer, name, SharedLowRank(shared, up.to(shared.device), bias.to(shared.device)))


@torch.no_grad()
def shared_basis(weights: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(down [K, K], columns [K, K], mean [K]): basis = down[:, :r], and W V with V = columns[:, :r] is the `up` of a weight W [N, K].

    For each r it is the best rank-r factorisation with one basis of all outputs W (x - mean) at once, in squares over `inputs` [M, K]
    (Eckart-Young on W C^1/2, the weights stacked; C is the covariance of the inputs). Computed in float64.
    """
    x = inputs.double()
    mean = x.mean(0)
    values, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    scale = values.clamp_min(values.max() * 1e-12).sqrt()
    root, inverse = axes * scale, axes / scale
    gram = torch.zeros_like(root)
    for weight in weights:
        product = weight.double() @ root
        gram += product.T @ product
    _, rotation = torch.linalg.eigh(gram)
    rotation = rotation.flip(1)
    down, columns = inverse @ rotation, root @ rotation
    length = down.norm(dim=0)  # columns of length 1 fit fp16
    return down / length, columns * length, mean
