"""Training the shapes world's autoencoder and encoding its data set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from flashgen.progress import track
from flashgen.randomness import generator
from flashgen.recipe.schema import AutoencoderTraining
from flashgen.shapes.render import render
from flashgen.shapes.scene import TASKS, realise, sample_request
from flashgen.training.loop import descend, fit, save_state
from flashgen.training.schedule import cosine, set_rates

VAE_STREAM, DATA_STREAM = 1, 2
TASK_SHARES = (0.1, 0.15, 0.2, 0.1, 0.25, 0.2)  # of the data set: one shape is learned long before two


def scene_batch(seed: int, step: int, batch: int, crop_px: int | None) -> torch.Tensor:
    """Rendered scenes in [-1, 1], [B, 3, H, W], channels last; random crops when `crop_px` is given."""
    rng = np.random.default_rng([seed, VAE_STREAM, step])
    images = np.stack([render(realise(sample_request(rng), rng, free=True)) for _ in range(batch)])
    if crop_px:
        tops = rng.integers(0, images.shape[1] - crop_px + 1, (batch, 2))
        images = np.stack([im[y : y + crop_px, x : x + crop_px] for im, (y, x) in zip(images, tops, strict=True)])
    return to_tensor(images)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return (torch.from_numpy(images).float() / 127.5 - 1).permute(0, 3, 1, 2)


def train_autoencoder(vae: AutoencoderKL, config: AutoencoderTraining, seed: int, work: Path) -> None:
    """L1 + L2 reconstruction and a light KL (our choice: flat colours need no perceptual or adversarial loss)."""
    vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    crop_steps = int(config.steps * config.crop_share)

    def step_fn(step: int) -> dict[str, float]:
        crops = step < crop_steps
        # A whole picture is four crops: the same pixels a step in both phases.
        batch = config.batch if crops else max(1, config.batch * config.crop_px**2 // 64**2)
        x = scene_batch(seed, step, batch, config.crop_px if crops else None)
        set_rates([optimizer], cosine(step, config.steps, warmup=50))
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator(seed, VAE_STREAM, step))
        error = vae.decode(z).sample - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + config.kl_weight * kl
        norm = descend(loss, parameters, [optimizer], clip=1.0, where=f"autoencoder step {step}")
        psnr = -10 * math.log10(error.square().mean().item() / 4)
        return {"loss": loss.item(), "psnr": psnr, "kl": kl.item(), "grad_norm": norm}

    fit("autoencoder", config.steps, step_fn, {"vae": vae, "optimizer": optimizer}, work)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, count: int, seed: int, work: Path) -> tuple[torch.Tensor, list[str]]:
    """Latents (normalised, fp16) of `count` rendered scenes with their captions; cached in `work/latents.pt`.

    Sets the scaling and shift factors of `vae.config` from the data, so that latents have mean 0 and variance 1.
    """
    path = work / "latents.pt"
    if not path.exists():
        rng = np.random.default_rng([seed, DATA_STREAM])
        latents, captions = [], []
        for _ in track(range(math.ceil(count / 64)), "encode scenes", total=math.ceil(count / 64)):
            requests = [sample_request(rng, task) for task in rng.choice(TASKS, 64, p=TASK_SHARES)]
            images = np.stack([render(realise(r, rng)) for r in requests])
            latents.append(vae.encode(to_tensor(images)).latent_dist.mean.half())
            captions += [r.caption() for r in requests]
        z = torch.cat(latents)[:count].contiguous()
        stats = {"shift": z.float().mean().item(), "scale": 1 / z.float().std().item()}
        save_state({"z": z, "captions": captions[:count], **stats}, path)
    saved = torch.load(path, weights_only=True)
    vae.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
    return (saved["z"].float() - saved["shift"]) * saved["scale"], saved["captions"]
