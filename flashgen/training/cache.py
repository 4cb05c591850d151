"""Cached steps of a trajectory source, the guided teacher or an earlier student, that a student learns (stage 1, trajectory guidance)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import move
from flashgen.flow.grid import check_nested
from flashgen.flow.ode import second_order
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.runtime.processes import rank, wait_for_all, world_size
from flashgen.training.checkpoint import save_state
from flashgen.training.prompts import PromptPool
from flashgen.training.rollout import guided_velocity, roll_out

CACHE_STREAM, ON_POLICY_STREAM = 10, 18  # of the initial noise
SHARD = 128  # prompts per file


@dataclass(frozen=True)
class TrajectorySource:
    """Whose steps a student learns: the guided teacher's, or those of a student of more steps (progressive distillation, 2202.00512).

    `sigmas` is its grid. The teacher steps with order 2 (our choice: 16 such steps show as much of a prompt as 28 of Euler's);
    a student with order 1, because its velocity is already guided and an average over its step.
    """

    net: nn.Module
    sigmas: list[float]
    guidance: float = 1.0
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
                sigma, sigma_next = (torch.full((len(x),), level, device=x.device) for level in (s, s_next))
                v = guided_velocity(self.net, x, sigma, cond, empty, self.guidance)
                x = move(x, second_order(v, s_next - s, previous), sigma, sigma_next)
                previous = (v, s_next - s) if self.order == 2 else None
            ends.append(x)
        return ends


@dataclass(frozen=True)
class Replay:
    """Cached steps: fp16 `starts` at a student's nodes and `ends` at the next ones, both [N, steps, C, h, w].

    Row i belongs to prompt i of `pool`, modulo its length where there are more rows than prompts.
    """

    starts: Tensor
    ends: Tensor
    pool: PromptPool

    @classmethod
    def from_states(cls, states: Tensor, pool: PromptPool) -> Replay:
        """Steps along trajectories [N, steps + 1, C, h, w], initial noise first."""
        return cls(states[:, :-1], states[:, 1:], pool)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """(start, end, conditioning) of the steps of `rows` [B] at `node` [B], in fp32."""
        at, steps, device = rows.cpu(), node.cpu(), self.pool.device
        start, end = (states[at, steps].to(device).float() for states in (self.starts, self.ends))
        return start, end, self.pool[at % len(self.pool)]

    def extended(self, other: Replay) -> Replay:
        """These steps, then those of `other`, whose prompts must be the first of this pool."""
        return Replay(torch.cat([self.starts, other.starts]), torch.cat([self.ends, other.ends]), self.pool)


@torch.no_grad()
def cache_trajectories(
    source: TrajectorySource,
    pool: PromptPool,
    nodes: list[float],
    shape: tuple[int, ...],
    seed: int,
    work: Path,
    *,
    student: nn.Module | None = None,
) -> Replay:
    """Steps of `source` between the student's `nodes`, which its grid must contain, from one noise [*shape] per prompt.

    From the source's own states, or from those that `student` visits (DAgger, 1011.0686; for a sampler our choice): the student's next
    state then follows from its own step, and the source's step is only the target. Written in shards to `work`, shared out over the
    processes; a resumed run computes the missing ones.
    """
    check_nested(nodes, source.sigmas)
    name, stream = ("on_policy", ON_POLICY_STREAM) if student else ("trajectories", CACHE_STREAM)
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    first_rows = range(0, len(pool), SHARD)
    of_this_rank = first_rows[rank() :: world_size()]
    for first in track(of_this_rank, name, total=len(of_this_rank)):
        path = folder / f"{first:06d}.pt"
        if path.exists():
            continue
        cond = pool[slice(first, first + SHARD)]
        noise = torch.randn((len(cond), *shape), generator=generator(seed, stream, first)).to(pool.device)
        visited = roll_out(lambda _: student, noise, cond, nodes[:-1]).states if student else None
        ends = source.ends(visited or noise, cond, pool.empty_for(cond), nodes)
        states = {"states": [noise, *ends]} if visited is None else {"starts": visited, "ends": ends}
        save_state({key: torch.stack(tensors, 1).half().cpu() for key, tensors in states.items()}, path)
    wait_for_all()
    shards = [torch.load(folder / f"{first:06d}.pt", weights_only=True, mmap=True) for first in first_rows]
    if student is None:
        return Replay.from_states(torch.cat([shard["states"] for shard in shards]), pool)
    return Replay(torch.cat([shard["starts"] for shard in shards]), torch.cat([shard["ends"] for shard in shards]), pool)
