"""Stage 1: cached steps of a teacher, or of an earlier student."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.errors import UsageError
from flashgen.families.base import velocity
from flashgen.flow.grid import shifted_grid
from flashgen.randomness import generator
from flashgen.training import cache as caching
from flashgen.training.cache import CACHE_STREAM, ON_POLICY_STREAM, Replay, TrajectorySource, cache_trajectories
from flashgen.training.prompts import PromptPool
from flashgen.training.rollout import guided_velocity, roll_out

SHAPE = (16, 4, 4)
Build = Callable[[int], nn.Module]


def cached(
    net: nn.Module, pool: PromptPool, work: Path, *, steps: int = 2, fine: int = 4, seed: int = 0, student: nn.Module | None = None
) -> Replay:
    nodes, grid = shifted_grid(steps, 3.0), shifted_grid(fine, 3.0)
    return cache_trajectories(TrajectorySource(net, grid, 2.0, order=2), pool, nodes, SHAPE, seed, work, student=student)


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
    monkeypatch.setattr(caching, "SHARD", 3)
    net, batches = transformer(0), list[int]()
    net.register_forward_hook(lambda module, inputs, output: batches.append(len(output[0])))
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


def test_on_policy_steps_start_where_the_student_is_and_end_where_the_teacher_goes_from_there(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD", 8)  # all prompts
    teacher, student, nodes, fine = transformer(0), transformer(1), shifted_grid(2, 3.0), shifted_grid(4, 3.0)
    replay = cached(teacher, pool, tmp_path, student=student)
    noise = torch.randn((8, *SHAPE), generator=generator(0, ON_POLICY_STREAM, 0))
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
    assert [p.name for p in (tmp_path / "on_policy").iterdir()] == ["000000.pt"]
    again = cached(teacher, pool, tmp_path, student=teacher)  # shards that exist are not computed again, whoever asks
    assert torch.equal(again.starts, replay.starts)


def test_an_earlier_student_is_followed_by_its_own_euler_steps(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD", 8)
    net, sigmas = transformer(0), [1.0, 0.8, 0.5, 0.0]
    replay = cache_trajectories(TrajectorySource(net, sigmas), pool, [1.0, 0.8, 0.0], SHAPE, 0, tmp_path)
    noise = torch.randn((8, *SHAPE), generator=generator(0, CACHE_STREAM, 0))
    states = roll_out(lambda _: net, noise, pool.cond, sigmas).states
    assert torch.allclose(replay.starts.float(), torch.stack(states[:2], 1), atol=2e-3, rtol=1e-3)
    assert torch.allclose(replay.ends.float(), torch.stack([states[1], states[3]], 1), atol=2e-3, rtol=1e-3)


def test_two_sets_of_steps_share_their_prompts(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    along = cached(transformer(0), pool, tmp_path)
    both = along.extended(cached(transformer(0), pool.first(6), tmp_path, student=transformer(1)))
    rows, node = torch.tensor([3, 11]), torch.tensor([1, 0])  # the same prompt in both
    start, end, cond = both.at(rows, node)
    assert len(both) == 14 and torch.equal(cond.tensors["embeds"][0], cond.tensors["embeds"][1])
    assert torch.equal(start[0], along.starts[3, 1].float()) and torch.equal(end[1], both.ends[11, 0].float())
