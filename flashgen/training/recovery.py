"""Teaching a student without T5 tokens to paint what it painted with them (encoder mode `prune`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flashgen.models.text import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.recipe.schema import RestructureRecipe
from flashgen.training.loop import Ema, descend, fit
from flashgen.training.matching import roll_out
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import cosine
from flashgen.training.trajectories import velocity

RECOVERY_STREAM = 13


def without_t5_tokens(cond: Conditioning, clip_tokens: int) -> Conditioning:
    return Conditioning(cond.embeds[:, :clip_tokens], cond.pooled)


def recover(
    student: nn.Module,
    full: nn.Module,
    pool: PromptPool,
    nodes: list[float],
    config: RestructureRecipe,
    shape: tuple[int, ...],
    seed: int,
    work: Path,
) -> None:
    """Regress `student`, which sees CLIP tokens only, onto the velocities of the frozen `full` student at its nodes.

    `full` sees T5 tokens that are zeros, which its training knows (`t5_drop`): with the T5 text it would ask for what CLIP
    tokens cannot tell, and the mean of that is a blur. States come from its own rollouts
    (our choice). Gradient: `student` only; it ends with its EMA weights.
    """
    sigmas = torch.tensor(nodes)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ema = Ema(student, 0.99)

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, RECOVERY_STREAM, step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.lr, step, config.iterations, warmup=20)
        cond = pool.draw(1.0, g)
        states = roll_out(lambda _: full, g.randn(*shape), cond, nodes).states
        node = g.randint(len(nodes) - 1)
        x, x_next = (torch.stack(states, 1)[torch.arange(len(node)), node + k] for k in (0, 1))
        v = velocity(student, x, sigmas[node], without_t5_tokens(cond, pool.clip_tokens))
        loss = trajectory_loss(v, x, x_next, sigmas[node], sigmas[node + 1])
        norm = descend(loss, parameters, [optimizer], clip=1.0, where=f"recovery step {step}")
        ema.update(student, step)
        return {"loss": loss.item(), "grad_norm": norm}

    fit("recovery", config.iterations, step_fn, {"student": student, "optimizer": optimizer, "ema": ema}, work)
    if config.iterations:
        ema.copy_to(student)
