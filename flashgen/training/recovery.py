"""Training a student to draw without its large text encoder what it drew with it: losses on its own trajectories, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from flashgen.families.base import Restructuring, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.randomness import generator
from flashgen.recipe.compression import DecoderRecipe, RestructureRecipe
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.cache import Replay, in_micro_batches, write_states
from flashgen.training.ema import Ema
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import CPU, Draws
from flashgen.training.roles import offloads
from flashgen.training.rollout import roll_out
from flashgen.training.schedule import cosine, set_rates

RECOVERY_STREAM, ROLLOUT_STREAM = 13, 17
ROLLOUT_BATCH = 64
Loss = Callable[[Draws], Tensor]
Ids = Mapping[str, Tensor]  # keyword arguments of a text encoder, [N, L] each, for the N prompts of a pool


@torch.no_grad()
def own_trajectories(
    student: nn.Module, pool: PromptPool, nodes: list[float], shape: tuple[int, ...], seed: int, folder: Path, micro_batch: int = 0
) -> Replay:
    """Steps of the student's own rollouts, from one noise [*shape] per prompt (our choice of states); written to `folder` and mapped.

    At most `micro_batch` prompts pass together (0: a whole part).
    """

    def compute(part: slice) -> list[list[Tensor]]:
        cond = pool[part]
        noise = pool.placed(torch.randn((len(cond), *shape), generator=generator(seed, ROLLOUT_STREAM, part.start)))
        return in_micro_batches(lambda rows: [roll_out(lambda _: student, noise[rows], cond[rows], nodes).states], len(cond), micro_batch)

    (states,), mappings = write_states(folder, {"states.bin": len(nodes)}, len(pool), shape, ROLLOUT_BATCH, compute, "own trajectories")
    return Replay.from_states(states, pool, *mappings)


def pruned_loss(student: nn.Module, replay: Replay, nodes: list[float], restructuring: Restructuring) -> Loss:
    """Velocity error of `student` without the encoder's tokens, on cached steps with them. Gradient: `student`."""
    return _velocity_loss(student, replay, nodes, lambda cond, rows: restructuring.pruned(cond))


def vision_loss(encoder: nn.Module, student: nn.Module, replay: Replay, ids: Ids, nodes: list[float], restructuring: Restructuring) -> Loss:
    """Velocity error of the frozen `student` with the output of `encoder`, on cached steps with its own encoder's.

    Gradient: through `student` to `encoder`. Source: DistillT5 (2503.19897), which follows a 50-step model; at the nodes of a few-step
    student instead (our choice).
    """
    return _velocity_loss(student, replay, nodes, lambda cond, rows: restructuring.with_output(cond, _encode(encoder, ids, rows)))


def embedding_loss(encoder: nn.Module, pool: PromptPool, ids: Ids, restructuring: Restructuring) -> Loss:
    """Squared error of the output of `encoder` against the large encoder's (DistillT5's baseline): cheap, a start for `vision_loss`."""

    def loss(draws: Draws) -> Tensor:
        rows = draws.randint(len(pool))
        output = _encode(encoder, ids, rows)
        return mse_loss(output, restructuring.share(pool[rows]).to(output.dtype))

    return loss


def _encode(encoder: nn.Module, ids: Ids, rows: Tensor) -> Tensor:
    output: Tensor = encoder(**{name: value[rows] for name, value in ids.items()})[0]
    return output


def _velocity_loss(student: nn.Module, replay: Replay, nodes: list[float], changed: Callable[[Conditioning, Tensor], Conditioning]) -> Loss:
    """Velocity error on one random cached step per sample, with the conditioning `changed(cond, rows)`."""
    sigmas = torch.tensor(nodes, device=replay.pool.device)

    def loss(draws: Draws) -> Tensor:
        rows, node = draws.randint(len(replay.pool)), draws.randint(len(nodes) - 1)
        x, x_next, cond = replay.at(rows, node)
        v = velocity(student, x, sigmas[node], changed(cond, rows))
        return trajectory_loss(v, x, x_next, sigmas[node], sigmas[node + 1])

    return loss


def recover(
    network: nn.Module,
    loss: Loss,
    config: RestructureRecipe | DecoderRecipe,
    iterations: int,
    seed: int,
    work: Path,
    checkpoint: CheckpointRecipe,
    name: str = "recovery",
    blocks: Sequence[nn.Module] = (),
    device: torch.device = CPU,
    micro_batch: int = 0,
    optimizer_bits: int = 32,
) -> None:
    """Minimise `loss` over the parameters of `network` that require gradient (it goes to these only); it ends with its EMA weights.

    `blocks` are the modules of `network` whose matrices Muon takes where `restructure.muon_lr` is above 0: a transformer's blocks, none of
    an encoder. `device` is where the networks are; at most `micro_batch` samples pass together (0: all of a process).
    """
    parameters, muon_lr = [p for p in network.parameters() if p.requires_grad], getattr(config, "muon_lr", 0.0)
    optimizers = muon_and_adamw(network, blocks, config, lr=config.lr, muon_lr=muon_lr, bits=optimizer_bits)
    ema = Ema(network, config.ema, offloads(network))

    def step_fn(step: int) -> dict[str, Metric]:
        draws = Draws(config.batch, seed, RECOVERY_STREAM, step, device=device)
        set_rates(optimizers, cosine(step, iterations, warmup=config.warmup, floor=config.lr_floor))
        losses = (part.rows / draws.rows * loss(part) for part in draws.micro_batches(micro_batch))
        value, norm = descend(losses, parameters, optimizers, clip=config.clip, where=f"{name} step {step}")
        ema.update(network, step)
        return {"loss": value, "grad_norm": norm}

    fit(name, iterations, step_fn, {"student": network, "ema": ema, **named("", optimizers)}, work, checkpoint)
    if iterations:
        ema.copy_to(network)
