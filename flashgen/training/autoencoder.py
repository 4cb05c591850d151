"""Training a world's autoencoder and encoding its data set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashgen.models.pipeline import Pipeline
from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import AutoencoderTraining
from flashgen.training.checkpoint import load_state, save_state
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.schedule import cosine, set_rates

if TYPE_CHECKING:
    from flashgen.judges.base import Pictures
    from flashgen.worlds.base import TeacherData

VAE_STREAM, DATA_STREAM = 1, 2
BATCH = 64  # pictures of the data set that are drawn and encoded together


def picture_batch(data: TeacherData, seed: int, step: int, batch: int, crop_px: int | None) -> Tensor:
    """Random pictures in [-1, 1], [B, 3, H, W]; random square crops of `crop_px` where it is given."""
    rng = np.random.default_rng([seed, VAE_STREAM, step])
    pictures = data.pictures(rng, batch)
    if crop_px:
        corners = rng.integers(0, pictures.shape[1] - crop_px + 1, (batch, 2))
        pictures = np.stack([picture[y : y + crop_px, x : x + crop_px] for picture, (y, x) in zip(pictures, corners, strict=True)])
    return to_tensor(pictures)


def to_tensor(pictures: Pictures) -> Tensor:
    """Pictures uint8 [B, H, W, 3] as float [B, 3, H, W] in [-1, 1]."""
    return (torch.from_numpy(pictures).float() / 127.5 - 1).permute(0, 3, 1, 2)


def train_autoencoder(
    vae: Any, data: TeacherData, config: AutoencoderTraining, seed: int, work: Path, checkpoint: CheckpointRecipe
) -> None:
    """Train a diffusers KL autoencoder on pictures of `data`, which are square. Gradient: all of `vae`.

    L1 + L2 reconstruction and a light KL term (our choice: flat colours need no perceptual or adversarial loss).
    """
    vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=0.0)
    crop_steps = int(config.steps * config.crop_share)
    side_px = data.pictures(np.random.default_rng(seed), 1).shape[1]
    full_batch = max(1, config.batch * config.crop_px**2 // side_px**2)  # the same number of pixels per step with crops and without

    def step_fn(step: int) -> dict[str, Metric]:
        crops = step < crop_steps
        x = picture_batch(data, seed, step, config.batch if crops else full_batch, config.crop_px if crops else None)
        set_rates([optimizer], cosine(step, config.steps, warmup=config.warmup, floor=config.lr_floor))
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator(seed, VAE_STREAM, step))
        error = vae.decode(z).sample - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + config.kl_weight * kl
        value, norm = descend([loss], parameters, [optimizer], clip=config.clip, where=f"autoencoder step {step}")
        psnr = -10 * math.log10(error.square().mean().item() / 4)
        return {"loss": value, "psnr": psnr, "kl": kl.item(), "grad_norm": norm}

    fit("autoencoder", config.steps, step_fn, {"vae": vae, "optimizer": optimizer}, work, checkpoint)


@torch.no_grad()
def encode_pictures(pipe: Pipeline, data: TeacherData, count: int, seed: int, work: Path) -> tuple[Tensor, list[str]]:
    """Normalised latents [N, C, h, w] of `count` pictures with their captions; cached in `work/latents.pt`.

    Sets the VAE's scaling and shift factors from the data, so that latents have mean 0 and variance 1.
    """
    path = work / "latents.pt"
    saved = load_state(path)
    if saved is None:
        rng = np.random.default_rng([seed, DATA_STREAM])
        parts, captions = [], list[str]()
        batches = math.ceil(count / BATCH)
        for _ in track(range(batches), "encode pictures", total=batches):
            pictures, texts = data.captioned_pictures(rng, BATCH)
            parts.append(pipe.vae.encode(to_tensor(pictures)).latent_dist.mean.half())
            captions += texts
        z = torch.cat(parts)[:count].contiguous()
        factors = {"shift": z.float().mean().item(), "scale": 1 / z.float().std().item()}
        saved = {"z": z, "captions": captions[:count], **factors}
        save_state(saved, path)
    pipe.vae.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
    return (saved["z"].float() - saved["shift"]) * saved["scale"], saved["captions"]
