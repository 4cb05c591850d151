"""Regression of a student onto cached steps (stage 1, trajectory guidance).

First along the source's own trajectories, then from the states that the student itself visits (`distill.on_policy`): a student that has
only seen the source's states does not correct its own errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.pixels import slices
from flashgen.recipe.distillation import Regression, by_step
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.cache import Replay
from flashgen.training.ema import Ema
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.ranks import Draws
from flashgen.training.roles import offloads, unwrap
from flashgen.training.schedule import cosine, set_rates
from flashgen.training.validation import Validate, Validation

STREAMS = {"trajectory": 11, "on_policy": 19}


def regress(
    student: nn.Module,
    replay: Replay,
    nodes: list[float],
    config: Regression,
    seed: int,
    work: Path,
    checkpoint: CheckpointRecipe,
    name: Literal["trajectory", "on_policy"] = "trajectory",
    validate: Validate | None = None,
    micro_batch: int = 0,
    others: Sequence[Replay] = (),
    optimizer_bits: int = 32,
) -> None:
    """Regress the student's velocity at the starts of cached steps onto their average velocity. Gradient: `student` only.

    The student ends with its EMA weights, which `validate` gets every `config.validate_every` steps. It sees the conditioning that the
    source saw, since a difference that its own conditioning does not tell would end in a blur. At most `micro_batch` samples pass
    together (0: all of a process), and their gradients add up. `others` are steps of pictures of further sizes; an update is of one
    size, which all processes draw.
    """
    device, replays = replay.pool.device, [replay, *others]
    sigmas, draw_weights = (
        torch.tensor(nodes, device=device),
        torch.tensor(by_step("node_draws", config.node_draws, len(nodes) - 1), dtype=torch.float32),
    )
    parameters, blocks = list(student.parameters()), replay.pool.family.blocks(unwrap(student))
    optimizers = muon_and_adamw(student, blocks, config, lr=config.lr, muon_lr=config.muon_lr, bits=optimizer_bits)
    ema, validation = Ema(student, config.ema, offloads(student)), Validation(validate, name, config.iterations, config.validate_every)

    def step_fn(step: int) -> dict[str, Metric]:
        draws = Draws(config.batch, seed, STREAMS[name], step, device=device)
        set_rates(optimizers, cosine(step, config.iterations, warmup=config.warmup, floor=config.lr_floor))
        cached = replays[draws.one_of(len(replays))]
        rows, node = draws.randint(len(cached)), draws.choice(draw_weights)

        def losses() -> Iterator[Tensor]:
            for part in slices(len(rows), micro_batch or len(rows)):
                at = node[part]
                x_from, x_to, cond = cached.at(rows[part], at)
                v = velocity(student, x_from, sigmas[at], cond)
                yield len(at) / len(rows) * trajectory_loss(v, x_from, x_to, sigmas[at], sigmas[at + 1], config.huber)

        loss, norm = descend(losses(), parameters, optimizers, clip=config.clip, where=f"{name} step {step}")
        ema.update(student, step)
        return {"loss": loss, "grad_norm": norm} | validation.after(step, ema, student)

    fit(name, config.iterations, step_fn, {"student": student, "ema": ema, **named("", optimizers)}, work, checkpoint)
    ema.copy_to(student)
