"""Muon beside torch's own."""

from __future__ import annotations

import torch
from torch import nn

from flashgen.randomness import generator
from flashgen.training.optimizers import Muon, orthogonalise

SHAPES = [(48, 16), (16, 48), (24, 24), (48, 16)]


def test_muon_steps_as_torchs_does_to_the_accuracy_of_its_bf16() -> None:
    g = generator(0, 1)
    start = [torch.randn(shape, generator=g) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    kinds: list[tuple[type[torch.optim.Muon], list[nn.Parameter]]] = [(Muon, ours), (torch.optim.Muon, theirs)]
    optimizers: list[torch.optim.Optimizer] = [kind(weights, lr=0.02, weight_decay=0.1, momentum=0.95) for kind, weights in kinds]
    for step in range(5):
        for k, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = None if (k, step) == (0, 1) else torch.randn(mine.shape, generator=g)  # one of two of a shape is left out once
            other.grad = None if mine.grad is None else mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.02 * (mine - before).norm()


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    matrices = torch.randn(3, 40, 12, generator=generator(0, 2)) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    for tall in (True, False):
        found = orthogonalise(matrices if tall else matrices.mT, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert found.shape == (matrices if tall else matrices.mT).shape
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5 and values.max() < 1.5
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        inner = (u.mT @ (found if tall else found.mT) @ vt.mT).flatten(1)  # diagonal in the matrix's own directions
        assert torch.allclose(inner, torch.diag_embed(torch.diagonal(inner.reshape(3, 12, 12), dim1=1, dim2=2)).flatten(1), atol=1e-4)


def test_a_zero_gradient_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 6))
