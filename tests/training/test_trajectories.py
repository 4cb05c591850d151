"""Stage 1: cached teacher trajectories and the regression onto them; the merge of branches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.errors import UsageError
from flashgen.flow.grid import shifted_grid
from flashgen.flow.ode import guide
from flashgen.models.text import Conditioning
from flashgen.randomness import generator
from flashgen.recipe.schema import DistillRecipe, TrajectoryTraining
from flashgen.stages.finetune import merge
from flashgen.training import trajectories
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.trajectories import (
    CACHE_STREAM,
    CORRECTION_STREAM,
    Leader,
    Replay,
    cache_trajectories,
    guided_velocity,
    train_on_trajectories,
    velocity,
)

SHAPE = (16, 4, 4)
Build = Callable[[int], nn.Module]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_guided_velocity_is_two_forwards_in_one(transformer: Build, pool: PromptPool) -> None:
    net = transformer(0)
    x, sigma = torch.randn(8, *SHAPE), torch.linspace(0.1, 1, 8)
    empty = pool.empty_for(pool.cond)
    with torch.no_grad():
        both = guided_velocity(net, x, sigma, pool.cond, empty, 4.5)
        apart = guide(velocity(net, x, sigma, empty), velocity(net, x, sigma, pool.cond), 4.5)
    assert torch.allclose(both, apart, atol=1e-5)
    assert not torch.allclose(both, guide(velocity(net, x, sigma, pool.cond), velocity(net, x, sigma, empty), 4.5), atol=1e-2)


def cached(
    net: nn.Module, pool: PromptPool, work: Path, *, steps: int = 2, fine: int = 4, seed: int = 0, student: nn.Module | None = None
) -> Replay:
    nodes, grid = shifted_grid(steps, 3.0), shifted_grid(fine, 3.0)
    return cache_trajectories(Leader(net, grid, 2.0, order=2), pool, nodes, SHAPE, seed, work, student=student)


def cache(net: nn.Module, pool: PromptPool, work: Path, *, steps: int = 2, fine: int = 4, seed: int = 0) -> Tensor:
    """States [N, steps + 1, C, H, W]."""
    replay = cached(net, pool, work, steps=steps, fine=fine, seed=seed)
    assert torch.equal(replay.starts[:, 1:], replay.ends[:, :-1])
    return torch.cat([replay.starts, replay.ends[:, -1:]], 1)


def test_cached_states_are_the_fine_trajectorys_at_the_students_nodes(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    net, fine = transformer(0), shifted_grid(4, 3.0)
    states = cache(net, pool, tmp_path)
    x = torch.randn((8, *SHAPE), generator=generator(0, CACHE_STREAM, 0))
    visited = {1.0: x}
    last: tuple[Tensor, float] | None = None
    with torch.no_grad():
        for s, s_next in itertools.pairwise(fine):
            v, step = guided_velocity(net, x, torch.full((8,), s), pool.cond, pool.empty_for(pool.cond), 2.0), s_next - s
            ahead = v + step / last[1] * (v - last[0]) / 2 if last else v
            x, last = x + step * ahead, (v, step)
            visited[s_next] = x
    expected = torch.stack([visited[s] for s in shifted_grid(2, 3.0)], 1)
    assert states.shape == (8, 3, *SHAPE) and states.dtype == torch.float16
    assert torch.allclose(states.float(), expected, atol=2e-3, rtol=1e-3)


def test_grids_nest_exactly_for_every_multiple_and_are_refused_otherwise(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    for steps, factor in itertools.product(range(1, 17), range(1, 9)):
        assert set(shifted_grid(steps, 3.0)) <= set(shifted_grid(steps * factor, 3.0))
    with pytest.raises(UsageError, match=r"teacher_steps=4 skips the student's sigma 0\.857, 0\.6; --set"):
        cache(transformer(0), pool, tmp_path, steps=3, fine=4)


def test_cache_computes_missing_shards_only_and_the_same_again(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "SHARD", 3)
    net, batches = transformer(0), list[int]()
    net.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    first = cache(net, pool, tmp_path)
    names = sorted(p.name for p in (tmp_path / "trajectories").iterdir())
    assert names == ["000000.pt", "000003.pt", "000006.pt"] and len(first) == 8
    (tmp_path / "trajectories" / names[1]).unlink()
    batches.clear()
    assert torch.equal(cache(net, pool, tmp_path), first)
    assert batches == [6] * 4  # one shard of three prompts, guided, four steps
    batches.clear()
    assert torch.equal(cache(net, pool, tmp_path), first) and batches == []
    assert not torch.equal(cache(net, pool, tmp_path / "other", seed=1), first)


def test_trajectory_training_lowers_its_loss_and_leaves_the_teacher(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    teacher = transformer(0)
    student = copy.deepcopy(teacher).requires_grad_(True)
    nodes, before = shifted_grid(2, 3.0), weights(teacher)
    states = cache(teacher, pool, tmp_path)
    config = TrajectoryTraining(iterations=30, batch=8, lr=3e-3)

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            target = (states[:, 1] - states[:, 0]).float() / (nodes[1] - nodes[0])
            return float((velocity(net, states[:, 0].float(), torch.ones(8), pool.cond) - target).square().mean())

    start = loss(student)
    train_on_trajectories(student, Replay.along(states, pool), nodes, config, 0, tmp_path)
    assert loss(student) < 0.9 * start
    assert same(weights(teacher), before) and all(p.grad is None for p in teacher.parameters())


def test_steps_are_drawn_as_often_as_the_recipe_says(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, seen, at = Replay.along(cache(transformer(0), pool, tmp_path), pool), list[Tensor](), Replay.at

    def watched(self: Replay, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        seen.append(node)
        return at(self, rows, node)

    monkeypatch.setattr(Replay, "at", watched)
    for draws, share in (([1.0], 0.5), ([1.0, 7.0], 7 / 8), ([0.0, 1.0], 1.0)):
        config = TrajectoryTraining(iterations=1, batch=512, node_draws=draws)
        train_on_trajectories(transformer(0).requires_grad_(True), replay, shifted_grid(2, 3.0), config, 0, tmp_path / str(draws))
        assert seen.pop().float().mean().item() == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("draws", [[1, 2, 3], [1, -1], [0], []])
def test_draws_that_fit_no_grid_are_refused(draws: list[float]) -> None:
    with pytest.raises(ValueError, match="node_draws"):
        DistillRecipe(steps=2, trajectory=TrajectoryTraining(node_draws=draws))


def test_compiled_training_learns_the_same_and_leaves_an_ordinary_network(
    transformer: Build, pool: PromptPool, tmp_path: Path, traced: list[nn.Module]
) -> None:
    replay = Replay.along(cache(transformer(0), pool, tmp_path / "cache"), pool)
    config, learned = TrajectoryTraining(iterations=2, batch=4, lr=1e-3), []
    for compiled in (False, True):
        student = transformer(0).requires_grad_(True)
        train_on_trajectories(student, replay, shifted_grid(2, 3.0), config, 0, tmp_path / str(compiled), compiled=compiled)
        learned.append(dict(student.state_dict()))
    eager, fused = learned
    assert len(traced) == 1 and traced[0] is student
    assert not same(list(eager.values()), weights(transformer(0)))
    assert eager.keys() == fused.keys() and all(torch.allclose(eager[key], fused[key], atol=1e-5) for key in eager)


def test_corrections_start_where_the_student_stands_and_end_where_the_teacher_goes_from_there(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "SHARD", 8)  # all prompts
    teacher, student, nodes, fine = transformer(0), transformer(1), shifted_grid(2, 3.0), shifted_grid(4, 3.0)
    replay = cached(teacher, pool, tmp_path, student=student)
    noise = torch.randn((8, *SHAPE), generator=generator(0, CORRECTION_STREAM, 0))
    with torch.no_grad():
        reached = noise + (nodes[1] - nodes[0]) * velocity(student, noise, torch.ones(8), pool.cond)
        a, b, end = fine[2:]
        v = guided_velocity(teacher, reached, torch.full((8,), a), pool.cond, pool.empty_for(pool.cond), 2.0)
        middle = reached + (b - a) * v
        w = guided_velocity(teacher, middle, torch.full((8,), b), pool.cond, pool.empty_for(pool.cond), 2.0)
        x = middle + (end - b) * (w + (end - b) / (b - a) * (w - v) / 2)
    assert torch.allclose(replay.starts.float(), torch.stack([noise, reached], 1), atol=2e-3, rtol=1e-3)
    assert torch.allclose(replay.ends[:, 1].float(), x, atol=2e-3, rtol=1e-3) and not torch.allclose(
        replay.ends[:, 0].float(), reached, atol=1e-2
    )
    assert [p.name for p in (tmp_path / "corrections").iterdir()] == ["000000.pt"]
    own = cached(teacher, pool, tmp_path, student=teacher)  # of another student, but kept: what a resumed run computes is the same
    assert torch.equal(own.starts, replay.starts)


def test_a_leading_student_is_followed_by_its_own_euler_steps(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "SHARD", 8)
    net, sigmas = transformer(0), [1.0, 0.8, 0.5, 0.0]
    replay = cache_trajectories(Leader(net, sigmas), pool, [1.0, 0.8, 0.0], SHAPE, 0, tmp_path)
    noise = torch.randn((8, *SHAPE), generator=generator(0, CACHE_STREAM, 0))
    states = trajectories.roll_out(lambda _: net, noise, pool.cond, sigmas).states
    assert torch.allclose(replay.starts.float(), torch.stack(states[:2], 1), atol=2e-3, rtol=1e-3)
    assert torch.allclose(replay.ends.float(), torch.stack([states[1], states[3]], 1), atol=2e-3, rtol=1e-3)


def test_two_sets_of_steps_share_their_prompts(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    along = cached(transformer(0), pool, tmp_path)
    both = along.and_also(cached(transformer(0), pool.first(6), tmp_path, student=transformer(1)))
    rows, node = torch.tensor([3, 11]), torch.tensor([1, 0])  # the same prompt's in either
    start, end, cond = both.at(rows, node)
    assert len(both) == 14 and torch.equal(cond.embeds[0], cond.embeds[1])
    assert torch.equal(start[0], along.starts[3, 1].float()) and torch.equal(end[1], both.ends[11, 0].float())


def test_a_coarser_student_reads_the_same_trajectories(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    fine, coarse = (cached(transformer(0), pool, tmp_path / str(n), steps=n) for n in (4, 2))
    read = fine.on([0, 2, 4])
    assert torch.equal(read.starts, coarse.starts) and torch.equal(read.ends, coarse.ends)


def test_prompts_are_drawn_with_their_own_t5_drop(pool: PromptPool) -> None:
    cond = pool.draw(0.3, Draws(400, 1))
    dropped = (cond.embeds[:, 16:] == 0).all(dim=(1, 2))
    assert 0.2 < dropped.float().mean() < 0.4
    assert not (cond.embeds[:, :16] == 0).any() and not (cond.embeds[~dropped][:, 16:] == 0).any()
    assert not (pool.cond.embeds == 0).any()  # the pool itself is left whole
    again = pool.draw(0.3, Draws(400, 1))
    assert torch.equal(again.embeds, cond.embeds) and torch.equal(again.pooled, cond.pooled)


def test_a_pool_can_drop_t5_for_good(pool: PromptPool) -> None:
    half = pool.dropping_t5(0.5, generator(2))
    every = slice(None)
    dropped = (half[every].embeds[:, 16:] == 0).all(dim=(1, 2))
    assert 0 < dropped.sum() < len(pool) and not (pool.cond.embeds == 0).any()
    assert torch.equal(half[every].embeds[~dropped], pool.cond.embeds[~dropped]) and torch.equal(half[every].pooled, pool.cond.pooled)
    assert torch.equal(half.dropping_t5(0.0, generator(3))[every].embeds, half[every].embeds)


def test_the_empty_prompt_has_no_t5_where_the_prompt_has_none(pool: PromptPool) -> None:
    """As a pipeline without T5 guides itself: zeros on both sides."""
    half = pool.dropping_t5(0.5, generator(2))[slice(None)]
    gone, empty = (half.embeds[:, 16:] == 0).all(dim=(1, 2)), pool.empty_for(half)
    assert torch.equal((empty.embeds[:, 16:] == 0).all(dim=(1, 2)), gone) and 0 < gone.sum() < len(pool)
    assert torch.equal(empty.embeds[~gone], pool.empty.embeds.expand(int((~gone).sum()), -1, -1))
    clip, pooled = pool.empty.embeds[:, :16].expand(8, -1, -1), pool.empty.pooled.expand(8, -1)
    assert torch.equal(empty.embeds[:, :16], clip) and torch.equal(empty.pooled, pooled)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_merge_is_the_exact_interpolation_of_two_branches(weight: float, transformer: Build) -> None:
    target, high, low = transformer(0), transformer(1), transformer(2)
    branches = weights(high), weights(low)
    merge(target, high, low, weight)
    merged = weights(target)
    if weight in (0.0, 1.0):
        assert same(merged, branches[0] if weight else branches[1])
    for value, a, b in zip(merged, *branches, strict=True):
        assert torch.allclose(value, (weight * a.double() + (1 - weight) * b.double()).float(), atol=1e-7, rtol=1e-6)
    assert same(weights(high), branches[0]) and same(weights(low), branches[1])
