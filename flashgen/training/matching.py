"""Distribution matching with timestep sharing (stage 2), also the objective of split-timestep fine-tuning (stage 3)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flashgen.flow.convert import add_noise, move, x0_from_v
from flashgen.models.text import Conditioning
from flashgen.objectives.matching import matching_direction, matching_loss, shared_point, shared_sigma
from flashgen.objectives.proxy import proxy_loss
from flashgen.randomness import generator
from flashgen.recipe.schema import MatchingTraining
from flashgen.training.loop import Ema, Stateful, descend, fit
from flashgen.training.prompts import PromptPool
from flashgen.training.trajectories import guided_velocity, velocity

MATCHING_STREAM = 12
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Rollout:
    """The student's states at its nodes, N+1 tensors [B, C, H, W]; the last one is the finished sample."""

    states: list[Tensor]
    cond: Conditioning


@torch.no_grad()
def roll_out(net_at: Callable[[float], nn.Module], noise: Tensor, cond: Conditioning, nodes: list[float]) -> Rollout:
    """Deterministic Euler steps; `net_at(sigma)` names the network of a node (split branches differ by sigma)."""
    states = [noise]
    for s, s_next in itertools.pairwise(nodes):
        sigma, sigma_next = torch.full((len(noise),), s), torch.full((len(noise),), s_next)
        states.append(move(states[-1], velocity(net_at(s), states[-1], sigma, cond), sigma, sigma_next))
    return Rollout(states, cond)


def train_matching(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    pool: PromptPool,
    nodes: list[float],
    config: MatchingTraining,
    shape: tuple[int, ...],
    seed: int,
    work: Path,
    *,
    t5_drop: float,
    train_nodes: list[int] | None = None,
    net_at: Callable[[float], nn.Module] | None = None,
) -> None:
    """Train `student` in place; it ends with its EMA weights.

    Per update: one rollout (N forwards), `proxy_updates` proxy steps on its finished samples, one student step on a
    random node of `train_nodes` (default all). The proxy starts as the teacher. Gradient: proxy steps change the proxy
    only, student steps the student only. The first `proxy_warmup` rounds update the proxy alone. A student update costs
    N + 3 r + 6 forward equivalents.
    """
    sigmas = torch.tensor(nodes)
    choices = torch.tensor(train_nodes if train_nodes is not None else list(range(len(nodes) - 1)))
    network_at = net_at or (lambda _: student)
    proxy = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.0, 0.99), weight_decay=0.0)
    proxy_optimizer = torch.optim.AdamW(proxy.parameters(), lr=config.proxy_lr, betas=(0.0, 0.99), weight_decay=0.0)
    ema = Ema(student, config.ema)

    def fit_proxy(rollout: Rollout, g: torch.Generator, step: int) -> float:
        x0 = rollout.states[-1]
        eps = torch.randn(x0.shape, generator=g)
        sigma = torch.rand(len(x0), generator=g) * 0.96 + 0.02
        loss = proxy_loss(velocity(proxy, add_noise(x0, eps, sigma), sigma, rollout.cond), x0, eps)
        descend(loss, proxy.parameters(), [proxy_optimizer], clip=1.0, where=f"{name} proxy step {step}")
        return loss.item()

    def fit_student(rollout: Rollout, g: torch.Generator, step: int) -> dict[str, float]:
        batch, cond = config.batch, rollout.cond
        node = choices[torch.randint(len(choices), (batch,), generator=g)]
        sigma, sigma_next = sigmas[node], sigmas[node + 1]
        x = torch.stack(rollout.states, 1)[torch.arange(batch), node]
        v = velocity(student, x, sigma, cond)
        x0 = x0_from_v(x, v, sigma)
        with torch.no_grad():
            sigma_eval = shared_sigma(sigma, sigma_next, torch.rand(batch, generator=g))
            x_eval = shared_point(x, v, sigma, sigma_eval)
            v_teacher = guided_velocity(teacher, x_eval, sigma_eval, cond, pool.empty_rows(batch), config.guidance)
            v_proxy = velocity(proxy, x_eval, sigma_eval, cond)
            x0_teacher, x0_proxy = x0_from_v(x_eval, v_teacher, sigma_eval), x0_from_v(x_eval, v_proxy, sigma_eval)
            direction = matching_direction(x0, x0_teacher, x0_proxy, floor=config.floor)
        loss = matching_loss(x0, direction)
        norm = descend(loss, student.parameters(), [optimizer], clip=1.0, where=f"{name} step {step}")
        ema.update(student, step)
        return {"direction": direction.abs().mean().item(), "grad_norm": norm, "std": rollout.states[-1].std().item()}

    def step_fn(step: int) -> dict[str, float]:
        g = generator(seed, MATCHING_STREAM, step)
        rollout = roll_out(network_at, torch.randn((config.batch, *shape), generator=g), pool.draw(config.batch, t5_drop, g), nodes)
        losses = [fit_proxy(rollout, g, step) for _ in range(config.proxy_updates)]
        update = fit_student(rollout, g, step - config.proxy_warmup) if step >= config.proxy_warmup else {}
        return {"proxy_loss": sum(losses) / len(losses), **update}

    networks: dict[str, Stateful] = {"student": student, "proxy": proxy, "ema": ema}
    fit(
        name,
        config.proxy_warmup + config.iterations,
        step_fn,
        {**networks, "optimizer": optimizer, "proxy_optimizer": proxy_optimizer},
        work,
    )
    if config.iterations:
        ema.copy_to(student)
