"""Teaching a student to paint without its T5 encoder what it painted with it: losses at its own nodes, and the loop around them."""

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
from flashgen.recipe.schema import RestructureRecipe
from flashgen.training.loop import Ema, descend, fit
from flashgen.training.matching import roll_out
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import cosine
from flashgen.training.trajectories import velocity

RECOVERY_STREAM = 13
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


def pruned_loss(student: nn.Module, full: nn.Module, pool: PromptPool, nodes: list[float], shape: tuple[int, ...]) -> Loss:
    """`student`, which sees CLIP tokens only, against the frozen `full` student.

    `full` sees T5 tokens that are zeros, which its training knows (`t5_drop`): with the T5 text it would ask for what CLIP
    tokens cannot tell, and the mean of that is a blur.
    """

    def loss(g: Draws) -> Tensor:
        cond = pool.draw(1.0, g)
        return _following(
            full, cond, lambda x, sigma: velocity(student, x, sigma, without_t5_tokens(cond, pool.clip_tokens)), nodes, shape, g
        )

    return loss


def vision_loss(
    encoder: T5EncoderModel, full: nn.Module, pool: PromptPool, ids: Tensor, nodes: list[float], shape: tuple[int, ...]
) -> Loss:
    """The frozen `full` student with the tokens of `encoder`, against itself with those of its own T5; `ids` [N, L] are the pool's.

    Gradient: through `full` to `encoder`. Source: DistillT5 (2503.19897), which follows a 50-step model; at the nodes of a few-step
    student instead (our choice).
    """

    def loss(g: Draws) -> Tensor:
        rows = g.randint(len(pool))
        cond = pool[rows]
        said = Conditioning(torch.cat([cond.embeds[:, : pool.clip_tokens], encoder(ids[rows])[0]], 1), cond.pooled)
        return _following(full, cond, lambda x, sigma: velocity(full, x, sigma, said), nodes, shape, g)

    return loss


def embedding_loss(encoder: T5EncoderModel, pool: PromptPool, ids: Tensor) -> Loss:
    """Plain regression onto the large encoder's tokens: the weak baseline (DistillT5)."""

    def loss(g: Draws) -> Tensor:
        rows = g.randint(len(pool))
        return mse_loss(encoder(ids[rows])[0], pool.cond.embeds[rows, pool.clip_tokens :])

    return loss


def _following(full: nn.Module, cond: Conditioning, predict: Predict, nodes: list[float], shape: tuple[int, ...], g: Draws) -> Tensor:
    """Velocity error of `predict` at one node each of rollouts of `full` (our choice of states)."""
    sigmas = torch.tensor(nodes)
    states = torch.stack(roll_out(lambda _: full, g.randn(*shape), cond, nodes).states, 1)
    node = g.randint(len(nodes) - 1)
    x, x_next = (states[torch.arange(len(node)), node + k] for k in (0, 1))
    return trajectory_loss(predict(x, sigmas[node]), x, x_next, sigmas[node], sigmas[node + 1])


def recover(trained: nn.Module, loss: Loss, config: RestructureRecipe, seed: int, work: Path) -> None:
    """Minimise `loss` over the parameters of `trained` (gradient: these only), which ends with its EMA weights."""
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ema = Ema(trained, 0.99)

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, RECOVERY_STREAM, step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.lr, step, config.iterations, warmup=20)
        value = loss(g)
        norm = descend(value, parameters, [optimizer], clip=1.0, where=f"recovery step {step}")
        ema.update(trained, step)
        return {"loss": value.item(), "grad_norm": norm}

    fit("recovery", config.iterations, step_fn, {"student": trained, "optimizer": optimizer, "ema": ema}, work)
    if config.iterations:
        ema.copy_to(trained)
