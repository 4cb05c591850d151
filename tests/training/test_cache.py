"""Stage 1: cached steps of a teacher, or of an earlier student."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.artifact.files import locked
from flashgen.errors import MachineError, NumericsError, UsageError
from flashgen.families.base import velocity
from flashgen.flow.grid import shifted_grid
from flashgen.flow.guidance import Guidance
from flashgen.randomness import generator
from flashgen.training import cache as caching
from flashgen.training.cache import CACHE_STREAM, ON_POLICY_STREAM, Replay, TrajectorySource, cache_trajectories
from flashgen.training.prompts import PromptPool
from flashgen.training.rollout import guided_velocity, roll_out

SHAPE = (16, 4, 4)
Build = Callable[[int], nn.Module]


def cached(
    net: nn.Module,
    pool: PromptPool,
    work: Path,
    *,
    steps: int = 2,
    fine: int = 4,
    seed: int = 0,
    student: nn.Module | None = None,
    micro_batch: int = 0,
) -> Replay:
    nodes, source = shifted_grid(steps, 3.0), TrajectorySource(net, shifted_grid(fine, 3.0), Guidance(2.0), order=2)
    return cache_trajectories(source, pool, nodes, SHAPE, seed, work, student=student, micro_batch=micro_batch)


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
            v, step = guided_velocity(net, x, s, pool.cond, pool.empty_for(pool.cond), Guidance(2.0)), s_next - s
            ahead = v + step / last[1] * (v - last[0]) / 2 if last else v
            x, last = x + step * ahead, (v, step)
            visited[s_next] = x
    expected = torch.stack([visited[s] for s in shifted_grid(2, 3.0)], 1)
    assert states.shape == (8, 3, *SHAPE) and states.dtype == torch.float16
    assert torch.allclose(states.float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("on_policy", [False, True])
def test_prompts_pass_in_micro_batches_and_end_where_they_would_together(
    on_policy: bool, transformer: Build, pool: PromptPool, tmp_path: Path
) -> None:
    net, student, batches = transformer(0), transformer(1) if on_policy else None, list[int]()
    whole = cached(net, pool, tmp_path / "whole", student=student)
    for network in (net, *([student] if student else [])):
        network.register_forward_hook(lambda module, inputs, output: batches.append(len(output[0])))
    parts = cached(net, pool, tmp_path / "parts", student=student, micro_batch=3)
    assert max(batches) == 6 and min(batches) >= 2  # 3 prompts with and without guidance; 8 prompts leave 2
    torch.testing.assert_close(parts.starts, whole.starts, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(parts.ends, whole.ends, rtol=1e-3, atol=2e-3)


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
    names = sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock")
    assert names == ["000000.done", "000003.done", "000006.done", "states.bin"] and len(first) == 8
    (tmp_path / names[1]).unlink()
    with (tmp_path / "states.bin").open("r+b") as file:  # the part was being written
        file.seek(3 * 2 * 3 * 16 * 4 * 4)
        file.write(bytes(100))
    batches.clear()
    assert torch.equal(cache(net, pool, tmp_path), first)
    assert batches == [6] * 4  # one shard of three prompts, guided, four steps
    batches.clear()
    assert torch.equal(cache(net, pool, tmp_path), first) and batches == []
    assert not list(tmp_path.glob("*.tmp"))
    assert not torch.equal(cache(net, pool, tmp_path / "other", seed=1), first)


@pytest.mark.parametrize(
    ("file", "size", "parts"),
    [("states.bin", 100, 3), ("states.bin", 0, 3), ("states.bin", None, 3), ("000003.done", 0, 1), ("000003.done", 70, 1), ("rows", 5, 1)],
)
def test_damaged_parts_are_computed_again(
    file: str,
    size: int | None,
    parts: int,
    transformer: Build,
    pool: PromptPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(caching, "SHARD", 3)
    net, calls = transformer(0), list[int]()
    first = cache(net, pool, tmp_path)
    if file == "rows":  # of the second part: same size, another number
        with (tmp_path / "states.bin").open("r+b") as stream:
            stream.seek(4 * 3 * 16 * 4 * 4 * 2 + 10)
            stream.write(b"\x01\x3c")
    elif size is None:
        (tmp_path / file).unlink()
    else:
        os.truncate(tmp_path / file, size)
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    assert torch.equal(cache(net, pool, tmp_path), first) and len(calls) == 4 * parts
    assert f"warning: {tmp_path}: {parts} of 3 parts are damaged and computed again" in capsys.readouterr().err
    assert torch.equal(cache(net, pool, tmp_path), first) and len(calls) == 4 * parts


@pytest.mark.parametrize("value", [65504.0, 65535.0, -1e30])
def test_a_state_beyond_fp16_is_not_kept(value: float, tmp_path: Path) -> None:
    states = [[torch.ones(4, 2), torch.tensor([[1.0, value]] * 4)]]
    if value == 65504.0:
        assert caching.write_states(tmp_path, {"a.bin": 2}, 4, (2,), 4, lambda _: states, "states")[0][0].isfinite().all()
        return
    with pytest.raises(NumericsError, match=r"states: a state is larger than fp16 holds \(65504\)"):
        caching.write_states(tmp_path, {"a.bin": 2}, 4, (2,), 4, lambda _: states, "states")
    assert not [*tmp_path.glob("*.done")]


def test_a_second_run_does_not_write_to_the_same_cache(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(MachineError, match="another process is writing to"):
        cache(transformer(0), pool, tmp_path)


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
        v = guided_velocity(teacher, reached, a, pool.cond, pool.empty_for(pool.cond), Guidance(2.0))
        middle = reached + (b - a) * v
        w = guided_velocity(teacher, middle, b, pool.cond, pool.empty_for(pool.cond), Guidance(2.0))
        x = middle + (end - b) * (w + (end - b) / (b - a) * (w - v) / 2)
    assert torch.allclose(replay.starts.float(), torch.stack([noise, reached], 1), atol=2e-3, rtol=1e-3)
    assert torch.allclose(replay.ends[:, 1].float(), x, atol=2e-3, rtol=1e-3) and not torch.allclose(
        replay.ends[:, 0].float(), reached, atol=1e-2
    )
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "000000.done", "starts.bin", "ends.bin"}
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


@pytest.mark.parametrize("on_policy", [False, True])
def test_micro_batches_change_nothing_but_the_rows_of_a_pass(on_policy: bool, transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    net, nodes, rows = transformer(0), shifted_grid(2, 3.0), list[int]()
    source, student = TrajectorySource(net, shifted_grid(4, 3.0), Guidance(2.0), order=2), transformer(1) if on_policy else None
    whole = cache_trajectories(source, pool, nodes, SHAPE, 0, tmp_path / "whole", student=student)
    net.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True)
    parts = cache_trajectories(source, pool, nodes, SHAPE, 0, tmp_path / "parts", student=student, micro_batch=3)
    assert set(rows) == {6, 4}  # 3, 3 and 2 of 8 prompts, with and without the prompt
    assert torch.allclose(parts.starts.float(), whole.starts.float(), atol=2e-3)
    assert torch.allclose(parts.ends.float(), whole.ends.float(), atol=2e-3)


def test_two_sets_of_steps_share_their_prompts(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    along = cached(transformer(0), pool, tmp_path / "along")
    on_policy = cached(transformer(0), pool.part(slice(6)), tmp_path / "on_policy", student=transformer(1))
    both = along.extended(on_policy)
    rows, node = torch.tensor([11, 3, 13, 0]), torch.tensor([0, 1, 1, 0])  # the same prompt in the first two
    start, end, cond = both.at(rows, node)
    assert len(both) == 14 and torch.equal(cond.tensors["embeds"][0], cond.tensors["embeds"][1])
    for got, name in ((start, "starts"), (end, "ends")):
        a, b = getattr(along, name), getattr(on_policy, name)
        assert torch.equal(got, torch.stack([b[3, 0], a[3, 1], b[5, 1], a[0, 0]]).float())
    assert torch.equal(both.pictures(torch.tensor([2, 7])), along.ends[[2, 7], -1].float())


GATHER = """
import sys, torch
from pathlib import Path
from flashgen.training.cache import Replay
from flashgen.training.mapped import map_tensor

def resident_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10

class Pool:
    def __len__(self): return 65536
    def __getitem__(self, rows): return None
    def placed(self, tensor): return tensor

generator, before = torch.Generator().manual_seed(0), resident_mib()
open(sys.argv[1], "wb").truncate(65536 * 5 * 16 * 64 * 64 * 2)  # sparse, so that the disk need not have the room
states, memory = map_tensor(Path(sys.argv[1]), torch.float16, (65536, 5, 16, 64, 64))
replay, peak = Replay.from_states(states, Pool(), memory), 0
replay.at(torch.tensor([65535]), torch.tensor([3]))
for _ in range(16):  # 3,072 states, 384 MiB
    rows, node = torch.randint(65536, (64,), generator=generator), torch.randint(4, (64,), generator=generator)
    replay.at(rows, node)
    replay.pictures(rows)
    peak = max(peak, resident_mib())
print(len(replay), peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory that Linux reports")
def test_65536_trajectories_of_512_px_are_mapped_within_a_gibibyte(tmp_path: Path) -> None:
    """43 GB in a sparse file; what is read of it must not stay in the process either, or an epoch would need all of it."""
    done = subprocess.run([sys.executable, "-c", GATHER, str(tmp_path / "states.bin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, grown_mib = map(int, done.stdout.split())
    assert count == 65536 and (tmp_path / "states.bin").stat().st_size == 65536 * 5 * 2 * 16 * 64 * 64
    assert grown_mib < 128  # of the 1 GiB that an epoch may take; without `release` all that is read stays, and an epoch takes 43 GB
