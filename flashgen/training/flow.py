"""Rectified-flow training of a small transformer on frozen text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.families.base import velocity
from flashgen.flow.convert import add_noise
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import FlowTraining
from flashgen.training.ema import Ema
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.ranks import Draws
from flashgen.training.schedule import hold_then_decay, set_rates

FLOW_STREAM = 3


def train_flow(
    pipe: Pipeline,
    latents: Tensor,
    captions: list[str],
    config: FlowTraining,
    sampler: Sampler,
    seed: int,
    work: Path,
    checkpoint: CheckpointRecipe,
) -> Ema:
    """Minimise |v - (eps - x0)|^2 on `latents` [N, C, h, w] with logit-normal sigma (SD3 eq. 19); returns the EMA weights.

    Captions are replaced by the empty one, and text encoders dropped independently of each other, as often as `config` says. Gradient: the
    transformer only. Every caption is encoded once, so no encoder runs during training.
    """
    transformer = pipe.transformer
    parameters = list(transformer.parameters())
    blocks = pipe.family.blocks(transformer)
    optimizers = muon_and_adamw(transformer, blocks, config, lr=config.adam_lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
    ema = Ema(transformer, config.ema)
    vocabulary = {caption: row for row, caption in enumerate(sorted(set(captions)))}
    caption_rows = torch.tensor([vocabulary[caption] for caption in captions])
    encoded = encode_prompts(pipe, [*vocabulary, ""], sampler)  # the empty caption is the last row
    if config.compile:
        transformer.compile()

    def step_fn(step: int) -> dict[str, Metric]:
        draws = Draws(config.batch, seed, FLOW_STREAM, step)
        rate = hold_then_decay(step, config.steps, warmup=config.warmup, decay_share=config.decay_share, floor=config.lr_floor)
        set_rates(optimizers, rate)
        rows = draws.randint(len(captions))
        x0 = latents[rows]
        cond = encoded[torch.where(draws.rand() < config.caption_drop, len(vocabulary), caption_rows[rows])]
        dropped = draws.rand(len(pipe.family.text_encoders)) < config.encoder_drop
        for column, encoder in enumerate(pipe.family.text_encoders):
            cond = cond.drop(encoder, dropped[:, column])
        eps = draws.randn(*x0.shape[1:])
        sigma = torch.sigmoid(config.sigma_mean + config.sigma_std * draws.randn())
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            v = velocity(transformer, add_noise(x0, eps, sigma), sigma, cond)
        loss = (v.float() - (eps - x0)).square().mean()
        value, norm = descend([loss], parameters, optimizers, clip=config.clip, where=f"teacher step {step}")
        ema.update(transformer, step)
        return {"loss": value, "grad_norm": norm}

    fit("teacher", config.steps, step_fn, {"transformer": transformer, "ema": ema, **named("", optimizers)}, work, checkpoint)
    return ema
