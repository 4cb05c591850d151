"""Teaching a student to paint without its T5 encoder what it painted with it: losses on its own trajectories, and the loop around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import T5EncoderModel

from flashgen.models.text import Conditioning
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import RestructureRecipe
from flashgen.training.loop import Ema, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import cosine, set_rates
from flashgen.training.trajectories import Replay, roll_out, velocity

RECOVERY_STREAM, ROLLOUT_STREAM = 13, 17
ROLLOUT_BATCH = 64
Loss = Callable[[Draws], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) to a velocity


def without_t5_tokens(cond: Conditioning, clip_tokens: int) -> Conditioning:
    return Conditioning(cond.embeds[:, :clip_tokens], cond.pooled)


def compact_t5(large: T5EncoderModel, config: RestructureRecipe, seed: int) -> T5EncoderModel:
    """A T5 encoder of the same width and vocabulary with fewer and narrower layers, which takes its place without an adapter.

    Token embeddings and the last norm are the large one's, the layers random.
    """
    own = large.config
    small = copy.deepcopy(own)
    small.num_layers = config.layers or max(1, own.num_layers // 4)
    small.num_heads = config.heads or max(1, own.num_heads // 2)
    small.d_ff = config.d_ff or max(1, own.d_ff // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = T5EncoderModel(small).eval()  # dropout would be another noise than the steps' own
    made.shared.weight.data.copy_(large.shared.weight)
    made.encoder.final_layer_norm.weight.data.copy_(large.encoder.final_layer_norm.weight)
    return made


@torch.no_grad()
def own_trajectories(full: nn.Module, pool: PromptPool, nodes: list[float], shape: tuple[int, ...], seed: int) -> Replay:
    """The states of the student's own rollouts, one noise a prompt: what it is to paint again without its T5 (our choice of states)."""
    found, starts = [], range(0, len(pool), ROLLOUT_BATCH)
    for start in track(starts, "own trajectories", total=len(starts)):
        cond = pool[slice(start, start + ROLLOUT_BATCH)]
        noise = torch.randn((len(cond.pooled), *shape), generator=generator(seed, ROLLOUT_STREAM, start))
        found.append(torch.stack(roll_out(lambda _: full, noise, cond, nodes).states, 1).half())
    return Replay.along(torch.cat(found), pool)


def pruned_loss(student: nn.Module, replay: Replay, nodes: list[float]) -> Loss:
    """`student`, which sees CLIP tokens only, on the trajectories of the whole one."""

    def loss(g: Draws) -> Tensor:
        rows = g.randint(len(replay.pool))
        cond = without_t5_tokens(replay.pool[rows], replay.pool.clip_tokens)
        return _following(replay, rows, lambda x, sigma: velocity(student, x, sigma, cond), nodes, g)

    return loss


def vision_loss(encoder: T5EncoderModel, full: nn.Module, replay: Replay, ids: Tensor, nodes: list[float]) -> Loss:
    """The frozen `full` student with the tokens of `encoder`, on its trajectories with those of its own T5; `ids` [N, L] are the pool's.

    Gradient: through `full` to `encoder`. Source: DistillT5 (2503.19897), which follows a 50-step model; at the nodes of a few-step
    student instead (our choice).
    """

    def loss(g: Draws) -> Tensor:
        rows, clip_tokens = g.randint(len(replay.pool)), replay.pool.clip_tokens
        cond = replay.pool[rows]
        said = Conditioning(torch.cat([cond.embeds[:, :clip_tokens], encoder(ids[rows])[0]], 1), cond.pooled)
        return _following(replay, rows, lambda x, sigma: velocity(full, x, sigma, said), nodes, g)

    return loss


def embedding_loss(encoder: T5EncoderModel, pool: PromptPool, ids: Tensor) -> Loss:
    """Plain regression onto the large encoder's tokens (DistillT5's baseline): cheap, so `vision_loss` begins where it ends."""

    def loss(g: Draws) -> Tensor:
        rows = g.randint(len(pool))
        return mse_loss(encoder(ids[rows])[0], pool.cond.embeds[rows, pool.clip_tokens :])

    return loss


def _following(replay: Replay, rows: Tensor, predict: Predict, nodes: list[float], g: Draws) -> Tensor:
    """Velocity error of `predict` at one node each of those trajectories."""
    sigmas, node = torch.tensor(nodes), g.randint(len(nodes) - 1)
    x, x_next, _ = replay.at(rows, node)
    return trajectory_loss(predict(x, sigmas[node]), x, x_next, sigmas[node], sigmas[node + 1])


def recover(
    trained: nn.Module, loss: Loss, config: RestructureRecipe, iterations: int, seed: int, work: Path, name: str = "recovery"
) -> None:
    """Minimise `loss` over the parameters of `trained` that want a gradient (it goes to these only); it ends with its EMA weights.

    Muon takes the matrices of a transformer's blocks where `restructure.muon_lr` says so; an encoder is AdamW's alone.
    """
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizers = muon_and_adamw(trained, config.muon_lr, config.lr)
    ema = Ema(trained, 0.99)

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, RECOVERY_STREAM, step)
        set_rates(optimizers, cosine(step, iterations, warmup=20))
        value = loss(g)
        norm = descend(value, parameters, optimizers, clip=1.0, where=f"{name} step {step}")
        ema.update(trained, step)
        return {"loss": value.item(), "grad_norm": norm}

    fit(name, iterations, step_fn, {"student": trained, "ema": ema, **named("", optimizers)}, work)
    if iterations:
        ema.copy_to(trained)
