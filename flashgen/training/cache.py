"""Cached steps of a trajectory source, the guided teacher or an earlier student, that a student learns (stage 1, trajectory guidance)."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flashgen.artifact.files import locked, remove_temporaries
from flashgen.errors import NumericsError
from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import move
from flashgen.flow.grid import check_nested
from flashgen.flow.guidance import Guidance
from flashgen.flow.ode import second_order
from flashgen.pixels import slices
from flashgen.progress import say, track, warn
from flashgen.randomness import generator
from flashgen.runtime.processes import from_first, rank, sharded, wait_for_all, world_size
from flashgen.training.mapped import is_whole, map_tensor, mark_written, read_mark, release
from flashgen.training.prompts import PromptPool
from flashgen.training.rollout import guided_velocity, roll_out

CACHE_STREAM, ON_POLICY_STREAM = 10, 18  # of the initial noise
NO_GUIDANCE = Guidance()
SHARD = 128  # prompts computed together


@dataclass(frozen=True)
class TrajectorySource:
    """Whose steps a student learns: the guided teacher's, or those of a student of more steps (progressive distillation, 2202.00512).

    `sigmas` is its grid. The teacher steps with order 2 (our choice: 16 such steps show as much of a prompt as 28 of Euler's);
    a student with order 1, because its velocity is already guided and an average over its step.
    """

    net: nn.Module
    sigmas: list[float]
    guidance: Guidance = NO_GUIDANCE
    order: Literal[1, 2] = 1

    def ends(self, starts: list[Tensor] | Tensor, cond: Conditioning, empty: Conditioning, nodes: list[float]) -> list[Tensor]:
        """States [B, C, h, w] to which the source gets at nodes[1:].

        From the noise `starts` on, as one trajectory; or from a list of states at nodes[:-1], each by a segment of its own.
        """
        ends: list[Tensor] = []
        x, previous = starts if isinstance(starts, Tensor) else starts[0], None
        for step, (node, next_node) in enumerate(itertools.pairwise(nodes)):
            if isinstance(starts, list):
                x, previous = starts[step], None
            for s, s_next in itertools.pairwise(s for s in self.sigmas if next_node <= s <= node):
                sigma, sigma_next = (torch.full((len(x),), value, device=x.device) for value in (s, s_next))
                v = guided_velocity(self.net, x, s, cond, empty, self.guidance)
                x = move(x, second_order(v, s_next - s, previous), sigma, sigma_next)
                previous = (v, s_next - s) if self.order == 2 else None
            ends.append(x)
        return ends


@dataclass(frozen=True)
class Replay:
    """Cached steps: fp16 `starts` at a student's nodes and `ends` at the next ones, both [N, steps, C, h, w], in memory or mapped.

    Row i belongs to prompt i of `pool`, modulo its length where there are more rows than prompts. `mappings` are those of the tensors'
    files, which `at` and `pictures` leave unread in memory. The rows of `more` follow.
    """

    starts: Tensor
    ends: Tensor
    pool: PromptPool
    mappings: tuple[mmap.mmap, ...] = ()
    more: Replay | None = None

    @classmethod
    def from_states(cls, states: Tensor, pool: PromptPool, *mappings: mmap.mmap) -> Replay:
        """Steps along trajectories [N, steps + 1, C, h, w], initial noise first."""
        return cls(states[:, :-1], states[:, 1:], pool, mappings)

    def __len__(self) -> int:
        return len(self.starts) + (len(self.more) if self.more else 0)

    def at(self, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """(start, end, conditioning) of the steps of `rows` [B] at `node` [B], in fp32 on the pool's device. Indices may be anywhere."""
        rows, node = rows.cpu(), node.cpu()
        start, end = (self.pool.placed(states).float() for states in self._gathered(rows, node))
        return start, end, self.pool[rows % len(self.pool)]

    def pictures(self, rows: Tensor) -> Tensor:
        """Final states [B, C, h, w] of the trajectories `rows` [B], below the pool's length, in fp32 on the pool's device."""
        states = self.ends[rows.cpu(), -1]
        release(*self.mappings)
        return self.pool.placed(states).float()

    def extended(self, other: Replay) -> Replay:
        """These steps, then those of `other`, whose prompts must be the first of this pool."""
        return replace(self, more=self.more.extended(other) if self.more else other)

    def _gathered(self, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """fp16 (starts, ends) [B, C, h, w]."""
        here = rows < len(self.starts)
        own = self.starts[rows[here], node[here]], self.ends[rows[here], node[here]]
        release(*self.mappings)
        if self.more is None or here.all():
            return own
        pairs = zip(own, self.more._gathered(rows[~here] - len(self.starts), node[~here]), strict=True)
        order = torch.cat([here.nonzero(), (~here).nonzero()]).flatten().argsort()  # the place of each row in `own`, then in `more`
        start, end = (torch.cat(pair)[order] for pair in pairs)
        return start, end


@torch.no_grad()
def cache_trajectories(
    source: TrajectorySource,
    pool: PromptPool,
    nodes: list[float],
    shape: tuple[int, ...],
    seed: int,
    folder: Path,
    *,
    student: nn.Module | None = None,
    micro_batch: int = 0,
) -> Replay:
    """Steps of `source` between the student's `nodes`, which its grid must contain, from one noise [*shape] per prompt.

    From the source's own states, or from those that `student` visits (DAgger, 1011.0686; for a sampler our choice): the student's next
    state then follows from its own step, and the source's step is only the target. Written to `folder`, one file [N, ...] of states or of
    starts and one of ends, in parts that the processes share out; a resumed run computes the missing parts. At most `micro_batch` prompts
    pass together (0: a whole part).
    """
    check_nested(nodes, source.sigmas)
    stream, steps = (ON_POLICY_STREAM if student else CACHE_STREAM), len(nodes) - 1

    def compute(part: slice) -> list[list[Tensor]]:
        cond = pool[part]
        noise = pool.placed(torch.randn((len(cond), *shape), generator=generator(seed, stream, part.start)))

        def some(rows: slice) -> list[list[Tensor]]:
            x, own = noise[rows], cond[rows]
            visited = roll_out(lambda _: student, x, own, nodes[:-1]).states if student else None
            ends = source.ends(visited or x, own, pool.empty_for(own), nodes)
            return [visited, ends] if visited else [[x, *ends]]

        return in_micro_batches(some, len(cond), micro_batch)

    if student is None:
        (states,), mappings = write_states(folder, {"states.bin": steps + 1}, len(pool), shape, SHARD, compute, "trajectories")
        return Replay.from_states(states, pool, *mappings)
    files = {"starts.bin": steps, "ends.bin": steps}
    (starts, ends), mappings = write_states(folder, files, len(pool), shape, SHARD, compute, "on_policy")
    return Replay(starts, ends, pool, mappings)


def in_micro_batches(compute: Callable[[slice], list[list[Tensor]]], count: int, micro_batch: int) -> list[list[Tensor]]:
    """Lists of states [count, ...] of `compute(rows)`, which computes `micro_batch` rows at a time (0: all)."""
    parts = [compute(rows) for rows in slices(count, micro_batch or count)]
    return [[torch.cat(states) for states in zip(*lists, strict=True)] for lists in zip(*parts, strict=True)]


def write_states(
    folder: Path,
    files: Mapping[str, int],
    count: int,
    shape: tuple[int, ...],
    rows: int,
    compute: Callable[[slice], list[list[Tensor]]],
    label: str,
) -> tuple[list[Tensor], tuple[mmap.mmap, ...]]:
    """(mapped fp16 states [count, length, *shape] per file, their mappings); `files` gives the name and the length of each.

    `compute(slice of at most `rows` rows)` returns a list of states [B, *shape] per file. Parts that `folder` has are not computed again;
    the processes share out the others. Raises MachineError if another run is writing to `folder`, and NumericsError for a state that fp16
    cannot hold.
    """

    def mapped() -> tuple[list[Tensor], tuple[mmap.mmap, ...]]:
        pairs = [map_tensor(folder / name, torch.float16, (count, length, *shape)) for name, length in files.items()]
        return [tensor for tensor, _ in pairs], tuple(memory for _, memory in pairs)

    with ExitStack() as lock:
        from_first(lambda: _open(folder, lock))
        parts = slices(count, rows)
        missing = from_first(lambda: _missing_parts(folder, parts, *mapped()))
        if len(missing) < len(parts):
            say(f"{label}: {len(parts) - len(missing)} of {len(parts)} parts are reused from {folder}")
        tensors, mappings = mapped()
        of_this_rank = _own_parts(missing, count, rows)
        for first in track(of_this_rank, label, total=len(of_this_rank)):
            part = slice(first, min(first + rows, count))
            for into, states in zip(tensors, compute(part), strict=True):
                half = torch.stack(states, 1).half()
                if bool(half.isinf().any()):  # NaN marks a row without a picture
                    raise NumericsError(f"{label}: a state is larger than fp16 holds (65504); the network that makes the states diverges")
                into[part] = half.cpu()
            mark_written(folder / f"{first:06d}.done", [], part, tensors, mappings)
        wait_for_all()
    return tensors, mappings


def _own_parts(missing: list[int], length: int, rows: int) -> list[int]:
    """First rows of the parts that this process computes.

    All processes must call a sharded network equally often: there some repeat a part of `rows` that another has, and all compute the
    shorter last one.
    """
    if not sharded():
        return missing[rank() :: world_size()]
    full = [first for first in missing if first + rows <= length]
    of_this_rank = (full[rank() :: world_size()] + full)[: -(-len(full) // world_size())]
    return of_this_rank + missing[len(full) :]


def _open(folder: Path, lock: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(folder))
    remove_temporaries(folder)


def _missing_parts(folder: Path, parts: list[slice], tensors: list[Tensor], mappings: tuple[mmap.mmap, ...]) -> list[int]:
    """First rows of the parts that `folder` does not have, or not as they were written."""
    marks = {part.start: read_mark(folder / f"{part.start:06d}.done") for part in parts}
    whole = {part.start for part in parts if (mark := marks[part.start]) and is_whole(mark[0], part, tensors, mappings)}
    if damaged := sum((folder / f"{first:06d}.done").exists() for first in marks.keys() - whole):
        warn(f"{folder}: {damaged} of {len(parts)} parts are damaged and computed again")
    return [part.start for part in parts if part.start not in whole]
