"""Rectified-flow training of a small SD3-class transformer on frozen text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flashgen.flow.convert import add_noise
from flashgen.models.text import Conditioning, encode_prompts
from flashgen.recipe.schema import FlowTraining
from flashgen.training.loop import Ema, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.ranks import Draws
from flashgen.training.schedule import hold_then_decay, set_rates
from flashgen.training.trajectories import velocity

FLOW_STREAM = 3


def drop_encoders(cond: Conditioning, keep: Tensor, width_l: int, width_g: int, clip_tokens: int) -> Conditioning:
    """Zero what CLIP-L, CLIP-G or T5 contribute to a sample where `keep` [B, 3] is 0, as SD3's training does."""
    embeds, pooled = cond.embeds.clone(), cond.pooled.clone()
    k = keep[:, :, None, None].to(embeds.dtype)
    embeds[:, :clip_tokens, :width_l] *= k[:, 0]
    embeds[:, :clip_tokens, width_l : width_l + width_g] *= k[:, 1]
    embeds[:, clip_tokens:] *= k[:, 2]
    pooled[:, :width_l] *= k[:, 0, 0]
    pooled[:, width_l:] *= k[:, 1, 0]
    return Conditioning(embeds, pooled)


def train_flow(pipe: StableDiffusion3Pipeline, latents: Tensor, captions: list[str], config: FlowTraining, seed: int, work: Path) -> Ema:
    """Minimise |v - (eps - x0)|^2 with logit-normal sigma (SD3 eq. 19); returns the EMA weights. Gradient: the transformer only."""
    transformer = pipe.transformer
    parameters = list(transformer.parameters())
    optimizers = muon_and_adamw(transformer, config.muon_lr, config.adam_lr, weight_decay=config.weight_decay)
    ema = Ema(transformer, config.ema)
    # Every caption once, the empty one last; no encoder runs during training.
    vocabulary = {caption: row for row, caption in enumerate(sorted(set(captions)))}
    index = torch.tensor([vocabulary[c] for c in captions])
    pool = encode_prompts(pipe, [*vocabulary, ""], config.t5_tokens)
    widths = pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size
    if config.compile:
        transformer.compile()

    def step_fn(step: int) -> dict[str, float]:
        g = Draws(config.batch, seed, FLOW_STREAM, step)
        set_rates(optimizers, hold_then_decay(step, config.steps, warmup=100, decay_share=config.decay_share))
        rows = g.randint(len(captions))
        x0, said = latents[rows], index[rows]
        said = torch.where(g.rand() < config.caption_drop, len(vocabulary), said)
        keep = (g.rand(3) >= config.encoder_drop).float()
        cond = drop_encoders(pool[said], keep, *widths, pipe.tokenizer.model_max_length)
        eps = g.randn(*x0.shape[1:])
        sigma = torch.sigmoid(config.sigma_mean + config.sigma_std * g.randn())
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            v = velocity(transformer, add_noise(x0, eps, sigma), sigma, cond)
        loss = (v.float() - (eps - x0)).square().mean()
        norm = descend(loss, parameters, optimizers, clip=1.0, where=f"teacher step {step}")
        ema.update(transformer, step)
        return {"loss": loss.item(), "grad_norm": norm}

    fit("teacher", config.steps, step_fn, {"transformer": transformer, "ema": ema, **named("", optimizers)}, work)
    return ema
