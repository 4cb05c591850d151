"""Cached steps of a leader, the teacher or an earlier student, and the student's regression onto them (stage 1, trajectory guidance).

First along the leader's own trajectories, then from where the student's lead it (`distill.correction`): a student that has only ever seen
the leader's states does not mend its own errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashgen.flow.convert import move
from flashgen.flow.grid import check_nested
from flashgen.flow.ode import guide, second_order
from flashgen.models.text import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.processes import rank, wait_for_all, world
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import Regression, by_step
from flashgen.training.loop import Ema, Watch, descend, fit, look, save_state
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import cosine, set_rates

CACHE_STREAM, CORRECTION_STREAM = 10, 18  # of noise
DRAWS = {"trajectory": 11, "correction": 19}
SHARD = 128


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """v [B, C, H, W] of one forward; sigma [B]."""
    v: Tensor = net(x, cond.embeds.to(x.dtype), cond.pooled.to(x.dtype), 1000 * sigma, return_dict=False)[0]
    return v


@dataclass(frozen=True)
class Rollout:
    """The student's states at its nodes, N+1 tensors [B, C, H, W]; the last one is the finished sample."""

    states: list[Tensor]
    cond: Conditioning

    def at(self, node: Tensor) -> Tensor:
        """State of each sample at its own node [B]."""
        return torch.stack(self.states, 1)[torch.arange(len(node)), node]


@torch.no_grad()
def roll_out(net_at: Callable[[float], nn.Module], noise: Tensor, cond: Conditioning, nodes: list[float]) -> Rollout:
    """Deterministic Euler steps; `net_at(sigma)` names the network of a node (split branches differ by sigma)."""
    states = [noise]
    for s, s_next in itertools.pairwise(nodes):
        sigma, sigma_next = torch.full((len(noise),), s), torch.full((len(noise),), s_next)
        states.append(move(states[-1], velocity(net_at(s), states[-1], sigma, cond), sigma, sigma_next))
    return Rollout(states, cond)


@dataclass(frozen=True)
class Replay:
    """Cached steps: fp16 `starts` at a student's nodes and `ends` at the next ones, both [N, steps, C, H, W].

    Row i is of prompt i of `pool`, and of i modulo its length where there are more rows than prompts.
    """

    starts: Tensor
    ends: Tensor
    pool: PromptPool

    @classmethod
    def along(cls, states: Tensor, pool: PromptPool) -> Replay:
        """Of trajectories, [N, steps + 1, C, H, W] with the start noise first."""
        return cls(states[:, :-1], states[:, 1:], pool)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """(start, end, what the prompt says) of the step of `rows` [B] at `node` [B], in fp32."""
        return self.starts[rows, node].float(), self.ends[rows, node].float(), self.pool[rows % len(self.pool)]

    def on(self, nodes: list[int]) -> Replay:
        """The same trajectories for a student with those of our nodes alone, the first and the last among them."""
        return Replay(self.starts[:, nodes[:-1]], self.ends[:, [node - 1 for node in nodes[1:]]], self.pool)

    def and_also(self, other: Replay) -> Replay:
        """Both, where the other's prompts are the first of ours."""
        return Replay(torch.cat([self.starts, other.starts]), torch.cat([self.ends, other.ends]), self.pool)


def teacher_velocities(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) as two forwards in one batch."""
    both = Conditioning(torch.cat([cond.embeds, empty.embeds]), torch.cat([cond.pooled, empty.pooled]))
    v_c, v_u = velocity(net, torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return v_c, v_u


def guided_velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning, guidance: float) -> Tensor:
    if guidance == 1:
        return velocity(net, x, sigma, cond)
    v_c, v_u = teacher_velocities(net, x, sigma, cond, empty)
    return guide(v_u, v_c, guidance)


@dataclass(frozen=True)
class Leader:
    """Whose steps a student learns: the guided teacher's, or those of a student of more steps (progressive distillation, 2202.00512).

    `sigmas` is the grid that it steps through. The teacher's steps are of second order (our choice: 16 of them show as much of a prompt
    as 28 of Euler's); a student's velocity is an average over its step already, and guided already.
    """

    net: nn.Module
    sigmas: list[float]
    guidance: float = 1.0
    order: Literal[1, 2] = 1


@torch.no_grad()
def cache_trajectories(
    leader: Leader,
    pool: PromptPool,
    nodes: list[float],
    shape: tuple[int, ...],
    seed: int,
    work: Path,
    *,
    student: nn.Module | None = None,
) -> Replay:
    """The leader's steps between the student's `nodes`, which its grid must contain, one noise a prompt.

    From its own states, or from those that `student` walks through (DAgger, 1011.0686; for a sampler our choice): its own next state
    is then its own step's, and the leader's serves as the answer only.
    Written in shards, shared out over the processes; a resumed run computes the missing ones.
    """
    check_nested(nodes, leader.sigmas)
    name, stream = ("corrections", CORRECTION_STREAM) if student else ("trajectories", CACHE_STREAM)
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(pool), SHARD)
    own = starts[rank() :: world()]
    for start in track(own, name, total=len(own)):
        path = folder / f"{start:06d}.pt"
        if not path.exists():
            cond = pool[slice(start, start + SHARD)]
            batch = len(cond.pooled)
            empty = pool.empty_for(cond)
            x = torch.randn((batch, *shape), generator=generator(seed, stream, start))
            begun = [x] if student is None else roll_out(lambda _: student, x, cond, nodes[:-1]).states
            ends, before = list[Tensor](), None
            for step, (node, next_node) in enumerate(itertools.pairwise(nodes)):
                if student is not None:
                    x, before = begun[step], None
                for s, s_next in itertools.pairwise(s for s in leader.sigmas if next_node <= s <= node):
                    sigma, sigma_next = torch.full((batch,), s), torch.full((batch,), s_next)
                    v = guided_velocity(leader.net, x, sigma, cond, empty, leader.guidance)
                    x = move(x, second_order(v, s_next - s, before), sigma, sigma_next)
                    before = (v, s_next - s) if leader.order == 2 else None
                ends.append(x)
            kept = {"states": begun + ends} if student is None else {"starts": begun, "ends": ends}
            save_state({key: torch.stack(held, 1).half() for key, held in kept.items()}, path)
    wait_for_all()
    shards = [torch.load(folder / f"{start:06d}.pt", weights_only=True, mmap=True) for start in starts]
    if student is None:
        return Replay.along(torch.cat([shard["states"] for shard in shards]), pool)
    return Replay(torch.cat([shard["starts"] for shard in shards]), torch.cat([shard["ends"] for shard in shards]), pool)


def train_on_trajectories(
    student: nn.Module,
    replay: Replay,
    nodes: list[float],
    config: Regression,
    seed: int,
    work: Path,
    name: Literal["trajectory", "correction"] = "trajectory",
    compiled: bool = False,
    watch: Watch | None = None,
) -> None:
    """Regress average velocities; `student` ends with the EMA weights, which `watch` sees on the way. States are those of `replay`.

    The student sees the text that the teacher saw: a regression onto what its own text cannot tell would end in a blur.
    `compiled` runs it through torch.compile, by shapes as they are: what another run has compiled before must not decide how sums go.
    """
    sigmas, draws = torch.tensor(nodes), torch.tensor(by_step("node_draws", config.node_draws, len(nodes) - 1), dtype=torch.float32)
    parameters = list(student.parameters())
    optimizers = muon_and_adamw(student, config.muon_lr, config.lr)
    ema = Ema(student, 0.99)
    learner: Any = torch.compile(student, dynamic=False) if compiled else student

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, DRAWS[name], step)
        set_rates(optimizers, cosine(step, config.iterations, warmup=20))
        rows, node = g.randint(len(replay)), g.choice(draws)
        x_from, x_to, cond = replay.at(rows, node)
        v = velocity(learner, x_from, sigmas[node], cond)
        loss = trajectory_loss(v, x_from, x_to, sigmas[node], sigmas[node + 1], config.huber)
        norm = descend(loss, parameters, optimizers, clip=1.0, where=f"{name} step {step}")
        ema.update(student, step)
        return {"loss": loss.item(), "grad_norm": norm} | look(watch, name, step, config.iterations, config.watch_every, ema, student)

    fit(name, config.iterations, step_fn, {"student": student, "ema": ema, **named("", optimizers)}, work)
    ema.copy_to(student)
