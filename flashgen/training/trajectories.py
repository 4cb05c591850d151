"""Cached teacher trajectories and the student's regression onto them (stage 1, trajectory guidance)."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from flashgen.errors import UsageError
from flashgen.flow.convert import move
from flashgen.flow.ode import guide
from flashgen.models.text import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import TrajectoryTraining
from flashgen.training.loop import Ema, descend, fit, save_state
from flashgen.training.prompts import PromptPool
from flashgen.training.schedule import cosine

CACHE_STREAM, TRAJECTORY_STREAM = 10, 11
SHARD = 128


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """v [B, C, H, W] of one forward; sigma [B]."""
    return net(x, cond.embeds, cond.pooled, 1000 * sigma, return_dict=False)[0]  # type: ignore[no-any-return]


def guided_velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning, guidance: float) -> Tensor:
    """Two forwards in one batch: unconditional and conditional."""
    both = Conditioning(torch.cat([empty.embeds, cond.embeds]), torch.cat([empty.pooled, cond.pooled]))
    v_u, v_c = velocity(net, torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
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
) -> Tensor:
    """The guided teacher's states at the student's `nodes`, fp16 [N, len(nodes), C, H, W], one noise a prompt.

    `fine` is the teacher's grid and must contain every node. Written in shards; a resumed run computes the missing ones.
    """
    if not set(nodes) <= set(fine):
        raise UsageError("distill.trajectory.teacher_steps must be a multiple of distill.steps, so that the grids nest")
    folder = work / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(pool), SHARD)
    shards = []
    for start in track(starts, "teacher trajectories", total=len(starts)):
        path = folder / f"{start:06d}.pt"
        if not path.exists():
            cond = pool.cond[slice(start, start + SHARD)]
            batch = len(cond.pooled)
            x = torch.randn((batch, *shape), generator=generator(seed, CACHE_STREAM, start))
            states = [x]
            for s, s_next in itertools.pairwise(fine):
                sigma, sigma_next = torch.full((batch,), s), torch.full((batch,), s_next)
                x = move(x, guided_velocity(teacher, x, sigma, cond, pool.empty_rows(batch), guidance), sigma, sigma_next)
                if s_next in nodes:
                    states.append(x)
            save_state({"states": torch.stack(states, 1).half()}, path)
        shards.append(torch.load(path, weights_only=True)["states"])
    return torch.cat(shards)


def train_on_trajectories(
    student: nn.Module,
    states: Tensor,
    pool: PromptPool,
    nodes: list[float],
    config: TrajectoryTraining,
    t5_drop: float,
    seed: int,
    work: Path,
) -> None:
    """Regress average velocities; `student` ends with the EMA weights. States of the teacher, full text (our choice: teacher forcing)."""
    sigmas = torch.tensor(nodes)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ema = Ema(student, 0.99)

    def step_fn(step: int) -> dict[str, float]:
        g = generator(seed, TRAJECTORY_STREAM, step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.lr, step, config.iterations, warmup=20)
        rows = torch.randint(len(states), (config.batch,), generator=g)
        node = torch.randint(len(nodes) - 1, (config.batch,), generator=g)
        cond = pool.cond[rows].without_t5(torch.rand(config.batch, generator=g) < t5_drop, pool.clip_tokens)
        x_from, x_to = states[rows, node].float(), states[rows, node + 1].float()
        loss = trajectory_loss(velocity(student, x_from, sigmas[node], cond), x_from, x_to, sigmas[node], sigmas[node + 1])
        norm = descend(loss, parameters, [optimizer], clip=1.0, where=f"trajectory step {step}")
        ema.update(student, step)
        return {"loss": loss.item(), "grad_norm": norm}

    fit("trajectory", config.iterations, step_fn, {"student": student, "optimizer": optimizer, "ema": ema}, work)
    ema.copy_to(student)
