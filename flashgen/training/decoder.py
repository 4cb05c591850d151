"""Training a tiny decoder to decode latents as the VAE does, and measuring how well it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from flashgen.recipe.compression import DecoderRecipe
from flashgen.training.cache import Replay
from flashgen.training.ranks import Draws
from flashgen.training.recovery import Loss

Decode = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in -1..1 of latents [B, C, h, w] on the transformer's scale
PEAK = 2.0  # range of a picture


def decoder_loss(decoder: nn.Module, vae: Decode, replay: Replay, count: int, config: DecoderRecipe) -> Loss:
    """Error of `decoder` against `vae` on random crops of the final latents of the first `count` trajectories. Gradient: `decoder`.

    L1 of the pixels, of the differences of neighbouring pixels (edges) and of mean colours, weighted as `config` says (our choice: TAESD's
    adversarial term would make pictures that a VAE's decoder does not). DEVIATION: the VAE decodes the crop alone, so its norms and its
    attention do not see the rest of the picture; memory then does not grow with the picture.
    """

    def loss(draws: Draws) -> Tensor:
        z = random_crops(replay.pictures(draws.randint(count)), draws, config.crop)
        with torch.no_grad():
            target = vae(z)
        error: Tensor = decoder(z) - target
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        colours = avg_pool2d(error, target.shape[-1] // z.shape[-1]).abs().mean()
        return error.abs().mean() + config.gradient * edges + config.coarse * colours

    return loss


def random_crops(z: Tensor, draws: Draws, side: int) -> Tensor:
    """Random crops [B, C, min(h, side), min(w, side)] of latents [B, C, h, w]."""
    height, width = (min(length, side) for length in z.shape[2:])
    tops, lefts = draws.randint(z.shape[2] - height + 1).tolist(), draws.randint(z.shape[3] - width + 1).tolist()
    return torch.stack([row[:, top : top + height, left : left + width] for row, top, left in zip(z, tops, lefts, strict=True)])


@torch.no_grad()
def squared_errors(decoder: Decode, vae: Decode, latents: Iterator[Tensor]) -> list[float]:
    """Mean squared error of each picture of `decoder` against that of `vae`, both cut to -1..1; `latents` [1, C, h, w] each."""
    return [float((decoder(z).clamp(-1, 1) - vae(z).clamp(-1, 1)).square().mean()) for z in latents]


def psnr_db(squared_error: float) -> float:
    """PSNR in dB of pictures in -1..1 with this mean squared error; 100 at most."""
    return 10 * float(torch.tensor(PEAK**2 / max(squared_error, PEAK**2 * 1e-10)).log10())
