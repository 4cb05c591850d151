"""Muon beside torch's own, and which parameters it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.sd3 import SD3
from flashgen.randomness import generator
from flashgen.recipe.base import Training
from flashgen.recipe.distillation import LoraTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.stages.trainings import moment_bytes
from flashgen.training.checkpoint import Checkpoint
from flashgen.training.optimizers import Muon, muon_and_adamw, orthogonalise
from flashgen.training.roles import roles_on, unwrap
from flashgen.training.schedule import cosine, hold_then_decay, set_rates

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
        result = orthogonalise(matrices if tall else matrices.mT, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert result.shape == (matrices if tall else matrices.mT).shape
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.5
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        inner = (u.mT @ (result if tall else result.mT) @ vt.mT).flatten(1)  # diagonal in the matrix's own directions
        assert torch.allclose(inner, torch.diag_embed(torch.diagonal(inner.reshape(3, 12, 12), dim1=1, dim2=2)).flatten(1), atol=1e-4)


def test_a_zero_gradient_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 6))


def optimizers_of(network: nn.Module, **changes: Any) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(network, SD3().blocks(unwrap(network)), Training(**changes), lr=0.01, muon_lr=0.1)


def test_each_parameter_has_exactly_one_optimizer_and_muon_gets_matrices_of_blocks(transformer: Callable[[int], nn.Module]) -> None:
    network = transformer(0)
    optimizers = optimizers_of(network, betas=(0.5, 0.6), muon_momentum=0.7)
    muon, adamw = ([p for g in optimizer.param_groups for p in g["params"]] for optimizer in optimizers)
    names = {id(p): n for n, p in network.named_parameters()}
    assert sorted(id(p) for p in [*muon, *adamw]) == sorted(names)
    assert {names[id(p)] for p in muon} == {n for n, p in network.named_parameters() if "transformer_blocks" in n and p.ndim == 2}
    assert optimizers[0].defaults["momentum"] == 0.7 and optimizers[1].defaults["betas"] == (0.5, 0.6)
    (alone,) = muon_and_adamw(network, [], Training(), lr=0.01, muon_lr=0.1)
    assert isinstance(alone, torch.optim.AdamW) and len(alone.param_groups[0]["params"]) == len(names)


def test_muon_gets_all_of_an_adapter_whose_matrices_lie_in_blocks(transformer: Callable[[int], nn.Module]) -> None:
    """Then there is nothing left for AdamW, and no AdamW."""
    _, student = roles_on(transformer(0), LoraTraining(rank=2), "student", seed=0, targets=SD3.lora_targets)
    (muon,) = optimizers_of(student)
    assert isinstance(muon, Muon) and [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in student.parameters()]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_moments_of_8_bits_step_nearly_as_those_of_32_and_a_resumed_training_steps_the_same(beta1: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config, g = Training(betas=(beta1, 0.99)), generator(0, 3)
    gradients = [torch.randn(96, 64, generator=g) for _ in range(8)]

    def network() -> nn.Linear:
        made = nn.Linear(64, 96)
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
        return made

    def train(network: nn.Linear, optimizer: torch.optim.Optimizer, steps: slice) -> Tensor:
        for gradient in gradients[steps]:
            network.weight.grad, network.bias.grad = gradient.clone(), gradient[:, 0].clone()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    networks = [network() for _ in range(3)]
    (full,), (eight,), (fresh,) = (
        muon_and_adamw(net, [], config, lr=0.01, muon_lr=0, bits=bits) for net, bits in zip(networks, (32, 8, 8), strict=True)
    )
    expected, found = train(networks[0], full, slice(5)), train(networks[1], eight, slice(5))
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.15
    stored = sum(value.nbytes for name, value in eight.state[networks[1].weight].items() if name.startswith(("state", "absmax")))
    assert stored == moment_bytes(config, 8) * networks[1].weight.numel()
    saved = Checkpoint(tmp_path, {"network": networks[1], "adamw": eight}, CheckpointRecipe())
    saved.save(5, [])
    saved.close()
    again = Checkpoint(tmp_path, {"network": networks[2], "adamw": fresh}, CheckpointRecipe())
    assert again.load()[0] == 5
    again.close()
    rest = slice(5, None)
    assert torch.equal(train(networks[1], eight, rest), train(networks[2], fresh, rest))


def test_learning_rates_warm_up_and_end_at_their_floor(transformer: Callable[[int], nn.Module]) -> None:
    cosines = [cosine(step, 100, warmup=10, floor=0.02) for step in range(100)]
    holds = [hold_then_decay(step, 100, warmup=10, decay_share=0.3, floor=0.02) for step in range(100)]
    for shares in (cosines, holds):
        assert shares[0] == 0.1 and shares[9] == 1 == max(shares)
        assert shares[10:] == sorted(shares[10:], reverse=True) and 0.02 <= shares[-1] < 0.075
    assert holds[69] == 1 > holds[75] and cosines[54] == pytest.approx(0.51, abs=0.025)
    muon, adamw = optimizers_of(transformer(0))
    for share in (0.5, 0.25):  # of the rates that they were created with, not of those that they have
        set_rates([muon, adamw], share)
        assert [optimizer.param_groups[0]["lr"] for optimizer in (muon, adamw)] == [0.1 * share, 0.01 * share]
