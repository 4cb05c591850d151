"""Rollouts of a student through its own nodes, and guided velocities of a teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning, concatenate
from flashgen.flow.convert import move
from flashgen.flow.guidance import Guidance, levels_of_steps
from flashgen.flow.ode import guide
from flashgen.recipe.distillation import MatchingTraining, TrajectoryTraining


@dataclass(frozen=True)
class Rollout:
    """The student's states at its nodes, N+1 tensors [B, C, h, w]; the last one is the finished sample."""

    states: list[Tensor]
    cond: Conditioning

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """The rollouts of micro-batches as one."""
        states = [torch.cat(states) for states in zip(*(part.states for part in parts), strict=True)]
        return cls(states, concatenate([part.cond for part in parts]))

    def at(self, node: Tensor) -> Tensor:
        """State [B, C, h, w] of each sample at its own node [B]."""
        return torch.stack(self.states, 1)[torch.arange(len(node), device=node.device), node]


@torch.no_grad()
def roll_out(net_at: Callable[[float], nn.Module], noise: Tensor, cond: Conditioning, nodes: list[float]) -> Rollout:
    """Deterministic Euler steps from `noise` [B, C, h, w]; `net_at(sigma)` is the network of a node (split branches differ by sigma)."""
    states = [noise]
    for s, s_next in itertools.pairwise(nodes):
        sigma, sigma_next = (torch.full((len(noise),), level, device=noise.device) for level in (s, s_next))
        states.append(move(states[-1], velocity(net_at(s), states[-1], sigma, cond), sigma, sigma_next))
    return Rollout(states, cond)


def teacher_velocities(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) velocities at `x` [B, C, h, w], `sigma` [B], as two forward passes in one batch."""
    v_c, v_u = velocity(net, torch.cat([x, x]), torch.cat([sigma, sigma]), concatenate([cond, empty])).chunk(2)
    return v_c, v_u


def guidance_of(config: TrajectoryTraining | MatchingTraining, shift: float) -> Guidance:
    """The teacher's guidance as `config` has it; `shift` is that of the teacher's grid, whose steps `skip_layers` counts."""
    guidance = Guidance(config.guidance, (config.guidance_interval[0], config.guidance_interval[1]) if config.guidance_interval else None)
    if (skip := config.skip_layers) is None:
        return guidance
    return replace(guidance, skip=tuple(skip.blocks), skip_scale=skip.scale, skip_interval=levels_of_steps(skip.start, skip.stop, shift))


def guided_velocity(net: nn.Module, x: Tensor, level: float, cond: Conditioning, empty: Conditioning, guidance: Guidance) -> Tensor:
    """Guided velocity at `x` [B, C, h, w], all at noise level `level`; as many forward passes as `guidance.forwards(level)` says."""
    sigma = torch.full((len(x),), level, device=x.device)
    weight, skip_weight = guidance.weight(level), guidance.skip_weight(level)
    if weight == 1:
        v = v_c = velocity(net, x, sigma, cond)
    else:
        v_c, v_u = teacher_velocities(net, x, sigma, cond, empty)
        v = guide(v_u, v_c, weight)
    return v + skip_weight * (v_c - velocity(net, x, sigma, cond, guidance.skip)) if skip_weight else v
