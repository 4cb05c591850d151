"""What a training keeps in the memory of an accelerator: micro-batches, moments, gradients, averages, precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import compute_in, velocity
from flashgen.randomness import generator
from flashgen.recipe.compression import RestructureRecipe
from flashgen.recipe.distillation import MatchingTraining, TrajectoryTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training import recovery, regression
from flashgen.training.cache import Replay
from flashgen.training.ema import Ema
from flashgen.training.loop import Metric
from flashgen.training.matching import Matcher, Roles, Task
from flashgen.training.optimizers import AdamWithoutMomentum
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import BUCKET, Draws

NODES, SHAPE = [1.0, 0.9, 0.75, 0.5, 0.0], (16, 4, 4)
Build = Callable[[int], nn.Module]
EVERY_TERM = {
    "node_adversarial": [0, 1, 0, 1],
    "node_trajectory": [1, 0, 0.5, 0],
    "augmentation": "decoupled",
    "node_matching": [1, 0, 1, 1],
}


@pytest.fixture
def replay(pool: PromptPool) -> Replay:
    return Replay.from_states(torch.randn(len(pool), len(NODES), *SHAPE, generator=generator(5)).half(), pool)


def numbers(metrics: Any) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


@pytest.mark.parametrize("changes", [{}, EVERY_TERM], ids=["paper", "every term"])
def test_four_micro_batches_of_16_are_a_batch_of_64_in_matching(changes: dict[str, Any], transformer: Build, replay: Replay) -> None:
    config, rounds = MatchingTraining.model_validate({"batch": 64, "fake_score_updates": 1} | changes), dict[int, dict[str, float]]()
    weights: dict[int, list[Tensor]] = {}
    for micro_batch in (0, 16):
        task = Task("matching", replay.pool, NODES, SHAPE, 3, 0.5, replay, micro_batch=micro_batch)
        matcher = Matcher(task, Roles(transformer(0).requires_grad_(True), transformer(1)), config, replay.pool.family)
        rounds[micro_batch] = numbers(matcher.update(0))
        weights[micro_batch] = [p.detach() for p in matcher.student.parameters()]
    averaged_otherwise = {"adversarial_ratio", "adversarial_raw", "heads_loss", "logit_real", "logit_fake"}  # over rows with that term
    for key in rounds[0].keys() - averaged_otherwise:
        assert rounds[16][key] == pytest.approx(rounds[0][key], rel=1e-5), key
    change = max(float((a - b).abs().max()) for a, b in zip(*weights.values(), strict=True))
    assert change <= 2 * config.lr  # a step of Adam has the size lr wherever the gradient is noise


def test_four_micro_batches_of_16_are_a_batch_of_64_in_regression_and_recovery(
    transformer: Build, replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, float]] = []

    def first_step(name: str, steps: int, step_fn: Callable[[int], dict[str, Metric]], *_: object) -> None:
        rows.append(numbers(step_fn(0)))

    for module in (regression, recovery):
        monkeypatch.setattr(module, "fit", first_step)
    for micro_batch in (0, 16):
        student = transformer(0).requires_grad_(True)
        config, checkpoint = TrajectoryTraining(batch=64), CheckpointRecipe()
        regression.regress(student, replay, NODES, config, 0, tmp_path, checkpoint, micro_batch=micro_batch)

        def loss(draws: Draws, student: nn.Module = student) -> Tensor:
            x, target, cond = replay.at(draws.randint(len(replay)), draws.randint(4))
            return (velocity(student, x, draws.rand(), cond) - target).square().mean()

        recovery.recover(student, loss, RestructureRecipe(batch=64), 1, 0, tmp_path, checkpoint, micro_batch=micro_batch)
    for whole, parts in zip(rows[:2], rows[2:], strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


def test_adam_without_momentum_steps_as_adamw_with_beta1_0_and_stores_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.training.ranks.BUCKET", 20)  # several buckets, one of them a single larger tensor
    assert BUCKET > 20
    start = [torch.randn(shape, generator=generator(1, n)) for n, shape in enumerate([(4, 3), (5,), (6, 6), (2,)])]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    mine, other = AdamWithoutMomentum(ours, 0.01, 0.99), torch.optim.AdamW(theirs, lr=0.01, betas=(0.0, 0.99), weight_decay=0.0)
    for step in range(4):
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = None if (n, step) == (1, 2) else torch.randn(a.shape, generator=generator(2, n, step))
            b.grad = None if a.grad is None else a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    stored = [sum(v.numel() for s in o.state.values() for k, v in s.items() if k != "step") for o in (mine, other)]
    assert 2 * stored[0] == stored[1] > 0
    resumed = AdamWithoutMomentum([nn.Parameter(w.clone()) for w in start], 0.5, 0.5)
    resumed.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert resumed.param_groups[0]["beta"] == 0.99 and all(int(s["step"]) in (3, 4) for s in resumed.state.values())


def test_full_training_keeps_at_most_24_bytes_per_weight_on_the_accelerator(
    transformer: Build, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher in bf16, student and fake score in fp32, gradients of one of them, one moment each; averages are on the CPU."""
    teacher, student, fake_score = transformer(1).bfloat16(), transformer(0).requires_grad_(True), transformer(1).requires_grad_(True)
    for network in (student, fake_score):
        compute_in(network, torch.bfloat16)
    matcher = Matcher(
        Task("m", replay.pool, NODES, SHAPE, 3, 0.5), Roles(student, teacher, fake_score), MatchingTraining(batch=8), replay.pool.family
    )
    networks, step, peak = (teacher, student, fake_score), AdamWithoutMomentum.step, [0]

    def counted(self: AdamWithoutMomentum, closure: None = None) -> None:
        step(self)
        tensors: list[torch.Tensor] = [p for network in networks for p in network.parameters()]
        tensors += [p.grad for p in tensors if p.grad is not None]
        tensors += [value for o in (*matcher.optimizers, *matcher.fake_score_optimizers) for s in o.state.values() for value in s.values()]
        peak[0] = max(peak[0], sum(t.nbytes for t in tensors))

    monkeypatch.setattr(AdamWithoutMomentum, "step", counted)
    matcher.update(0)
    assert 20 < peak[0] / sum(p.numel() for p in teacher.parameters()) <= 24
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_an_offloaded_average_is_the_average(transformer: Build) -> None:
    network = transformer(0).requires_grad_(True)
    averages = [Ema(network, 0.5, offload) for offload in (False, True)]
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    for average in averages:
        average.update(network, 3)
    assert all(torch.equal(averages[0].shadow[key], averages[1].shadow[key]) for key in averages[0].shadow)


def test_autocast_rounds_passes_but_neither_weights_nor_gradients_nor_outputs(transformer: Build, pool: PromptPool) -> None:
    network, x, sigma = transformer(0).requires_grad_(True), torch.randn(8, *SHAPE, generator=generator(9)), torch.linspace(0.1, 1, 8)
    exact = velocity(network, x, sigma, pool.cond)
    compute_in(network, torch.bfloat16)
    rounded = velocity(network, x, sigma, pool.cond)
    assert rounded.dtype == torch.float32 and 0 < float((rounded - exact).abs().max()) < 0.05
    rounded.square().mean().backward()  # type: ignore[no-untyped-call]
    assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}
    frozen = copy.deepcopy(network).bfloat16()
    assert velocity(frozen, x, sigma, pool.cond).dtype == torch.float32
