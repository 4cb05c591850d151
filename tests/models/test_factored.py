"""adaLN layers on a shared basis: the best one in squares, exact at full rank."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.models.factored import SharedLowRank, factor, modulations, shared_basis
from flashgen.models.pipeline import Pipeline


def inputs(rank: int, width: int = 12, rows: int = 200) -> Tensor:
    """Inputs on an affine plane of `rank` dimensions, unevenly spread over it."""
    g = torch.Generator().manual_seed(rank)
    spread = torch.randn(rows, rank, generator=g) * torch.linspace(3, 0.3, rank)
    return spread @ torch.randn(rank, width, generator=g) + torch.randn(width, generator=g)


def outputs_lost(weights: list[Tensor], x: Tensor, rank: int) -> float:
    down, columns, mean = shared_basis(weights, x)
    centred = x.double() - mean
    return sum(float((centred @ (w.double() - w.double() @ columns[:, :rank] @ down[:, :rank].T).T).square().sum()) for w in weights)


def test_inputs_of_rank_three_need_a_basis_of_three() -> None:
    weights = [torch.randn(n, 12) for n in (5, 30)]
    lost = [outputs_lost(weights, inputs(3), rank) for rank in (1, 2, 3)]
    assert lost[0] > lost[1] > 1e-3 and lost[2] < 1e-6


def test_no_orthogonal_basis_loses_less() -> None:
    """Compared with the principal axes of the inputs, and with those of the weights."""
    weights, x = [torch.randn(n, 12) * torch.linspace(0.1, 3, 12) for n in (8, 20)], inputs(9)
    stacked = torch.cat(weights)
    centred = x - x.mean(0)
    by_input = torch.linalg.svd(centred, full_matrices=False).Vh[:4]
    by_weight = torch.linalg.svd(stacked, full_matrices=False).Vh[:4]
    least = outputs_lost(weights, x, 4)
    for axes in (by_input, by_weight):
        assert least < float((centred @ (stacked - stacked @ axes.T @ axes).T).square().sum())
    singular = torch.linalg.svdvals((centred @ stacked.T).double())  # Eckart-Young: nothing of rank 4 does better
    assert abs(least - float(singular[4:].square().sum())) < 1e-6 * float(singular.square().sum())


def test_basis_of_full_rank_changes_nothing_and_is_shared(pipe: Pipeline) -> None:
    net = pipe.transformer
    layers = modulations(net, pipe.family)
    width = next(iter(layers.values())).in_features
    x = torch.randn(64, width)
    before = {name: layer(x) for name, layer in layers.items()}
    down, columns, _ = shared_basis([layer.weight for layer in layers.values()], x)
    factor(net, down.float(), {name: (layer.weight.double() @ columns).float() for name, layer in layers.items()})
    factored = {name: net.get_submodule(name) for name in layers}
    assert len(layers) == 2 * len(net.transformer_blocks) and not modulations(net, pipe.family)
    assert len({id(layer.basis) for layer in factored.values() if isinstance(layer, SharedLowRank)}) == 1
    for name, layer in factored.items():
        assert torch.allclose(layer(x), before[name], atol=1e-3)
