"""Rectified-flow training of a small SD3-class teacher, text encoders trained along."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from flashgen.models.text import encode, tokenize
from flashgen.randomness import generator
from flashgen.recipe.schema import FlowTraining
from flashgen.training.autoencoder import hold_then_decay
from flashgen.training.loop import Ema, descend, fit

FLOW_STREAM = 3


def roles(pipe: StableDiffusion3Pipeline) -> nn.ModuleDict:
    """The networks that flow training changes; the position tables of CLIP stay as built."""
    module = nn.ModuleDict({k: getattr(pipe, k) for k in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")})
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("position_embedding" not in name)
    return module


def optimizers_for(module: nn.Module, config: FlowTraining) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside blocks, AdamW on embeddings, biases, norms and in/out projections."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inner = ("transformer_blocks" in name or ".block." in name or ".layers." in name) and parameter.ndim == 2
            (matrices if inner and "relative_attention_bias" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def train_flow(
    pipe: StableDiffusion3Pipeline, latents: torch.Tensor, captions: list[str], config: FlowTraining, seed: int, work: Path
) -> Ema:
    """Minimise |v - (eps - x0)|^2 with logit-normal sigma (SD3 eq. 19); returns the EMA weights."""
    module = roles(pipe)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = optimizers_for(module, config)
    ema = Ema(module, config.ema)
    tokens = tokenize(pipe, [*captions, ""], config.t5_tokens)
    base_lrs = [config.muon_lr, config.adam_lr]
    if config.compile:
        pipe.transformer.compile()

    def step_fn(step: int) -> dict[str, float]:
        g = generator(seed, FLOW_STREAM, step)
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = hold_then_decay(lr, step, config.steps, warmup=100, decay_share=config.decay_share)
        rows = torch.randint(len(captions), (config.batch,), generator=g)
        x0 = latents[rows]
        rows = torch.where(torch.rand(config.batch, generator=g) < config.caption_drop, len(captions), rows)
        keep = (torch.rand(config.batch, 3, generator=g) >= config.encoder_drop).float()
        eps = torch.randn(x0.shape, generator=g)
        sigma = torch.sigmoid(config.sigma_mean + config.sigma_std * torch.randn(config.batch, generator=g))
        loss = _flow_loss(pipe, x0, eps, sigma, tokens[rows], keep, config)
        norm = descend(loss, parameters, optimizers, clip=1.0, where=f"teacher step {step}")
        ema.update(module, step)
        return {"loss": loss.item(), "grad_norm": norm}

    named = {"muon": optimizers[0], "adamw": optimizers[1]}
    fit("teacher", config.steps, step_fn, {"module": module, "ema": ema, **named}, work)
    return ema


def _flow_loss(pipe, x0, eps, sigma, tokens, keep, config: FlowTraining) -> torch.Tensor:  # type: ignore[no-untyped-def]
    c = encode(pipe, tokens, config.t5_tokens, keep)
    s = sigma[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        v = pipe.transformer((1 - s) * x0 + s * eps, c.embeds, c.pooled, 1000 * sigma, return_dict=False)[0]
    loss: torch.Tensor = (v.float() - (eps - x0)).square().mean()
    return loss
