"""Cached teacher trajectories and the student's regression onto them (stage 1, trajectory guidance)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flashgen.errors import UsageError
from flashgen.flow.convert import move
from flashgen.flow.ode import guide
from flashgen.models.text import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.processes import rank, wait_for_all, world
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import TrajectoryTraining
from flashgen.training.loop import Ema, descend, fit, save_state
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import cosine

CACHE_STREAM, TRAJECTORY_STREAM = 10, 11
SHARD = 128


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """v [B, C, H, W] of one forward; sigma [B]."""
    v: Tensor = net(x, cond.embeds.to(x.dtype), cond.pooled.to(x.dtype), 1000 * sigma, return_dict=False)[0]
    return v


@dataclass(frozen=True)
class Replay:
    """Cached teacher trajectories: fp16 `states` [N, nodes, C, H, W], and the prompts they were drawn for, row by row."""

    states: Tensor
    pool: PromptPool

    def only(self, rows: Tensor) -> Replay:
        """The trajectories that bool `rows` [N] names."""
        return Replay(self.states[rows], self.pool.only(rows))


def teacher_velocities(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) as two forwards in one batch."""
    both = Conditioning(torch.cat([cond.embeds, empty.embeds]), torch.cat([cond.pooled, empty.pooled]))
    v_c, v_u = velocity(net, torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return v_c, v_u


def guided_velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning, guidance: float) -> Tensor:
    v_c, v_u = teacher_velocities(net, x, sigma, cond, empty)
    return guide(v_u, v_c, guidance)


@torch.no_grad()
def cache_trajectories(
    teacher: nn.Module,
    pool: PromptPool,
    nodes: list[float],
    fine: list[float],
    shape: tuple[int, ...],
    guidance: float,
    seed: int,
    work: Path,
) -> Replay:
    """The guided teacher's states at the student's `nodes`, one noise a prompt.

    `fine` is the teacher's grid and must contain every node. Written in shards, shared out over the
    processes; a resumed run computes the missing ones.
    """
    if not set(nodes) <= set(fine):
        raise UsageError("distill.trajectory.teacher_steps must be a multiple of distill.steps, so that the grids nest")
    folder = work / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(pool), SHARD)
    own = starts[rank() :: world()]
    for start in track(own, "teacher trajectories", total=len(own)):
        path = folder / f"{start:06d}.pt"
        if not path.exists():
            cond = pool[slice(start, start + SHARD)]
            batch = len(cond.pooled)
            x = torch.randn((batch, *shape), generator=generator(seed, CACHE_STREAM, start))
            states = [x]
            for s, s_next in itertools.pairwise(fine):
                sigma, sigma_next = torch.full((batch,), s), torch.full((batch,), s_next)
                x = move(x, guided_velocity(teacher, x, sigma, cond, pool.empty_rows(batch), guidance), sigma, sigma_next)
                if s_next in nodes:
                    states.append(x)
            save_state({"states": torch.stack(states, 1).half()}, path)
    wait_for_all()
    return Replay(torch.cat([torch.load(folder / f"{start:06d}.pt", weights_only=True)["states"] for start in starts]), pool)


def train_on_trajectories(
    student: nn.Module,
    replay: Replay,
    nodes: list[float],
    config: TrajectoryTraining,
    seed: int,
    work: Path,
) -> None:
    """Regress average velocities; `student` ends with the EMA weights. States are the teacher's (our choice: teacher forcing).

    The student sees the text that the teacher saw: a regression onto what its own text cannot tell would end in a blur.
    """
    sigmas, states = torch.tensor(nodes), replay.states
    parameters = list(student.parameters())
    optimizers = named("", muon_and_adamw(student, config.muon_lr, config.lr))
    rates = {"muon": config.muon_lr, "adamw": config.lr}
    ema = Ema(student, 0.99)

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, TRAJECTORY_STREAM, step)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = cosine(rates[name], step, config.iterations, warmup=20)
        rows = g.randint(len(states))
        node = g.randint(len(nodes) - 1)
        x_from, x_to = states[rows, node].float(), states[rows, node + 1].float()
        loss = trajectory_loss(velocity(student, x_from, sigmas[node], replay.pool[rows]), x_from, x_to, sigmas[node], sigmas[node + 1])
        norm = descend(loss, parameters, optimizers.values(), clip=1.0, where=f"trajectory step {step}")
        ema.update(student, step)
        return {"loss": loss.item(), "grad_norm": norm}

    fit("trajectory", config.iterations, step_fn, {"student": student, "ema": ema, **optimizers}, work)
    ema.copy_to(student)
