"""The adversarial term in latent space, on features of the fake score (SD3.5-Flash; LADD and NitroFusion before it).

Losses take logits [B, heads]; `training.discriminator` computes them from hidden states of the fake score's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


def generator_loss(fake: Tensor) -> Tensor:
    """Mean softplus(-logit), the non-saturating loss. Gradient: through `fake` to the sample."""
    return softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean softplus(logit of fake) + softplus(-logit of real). Gradient: the heads; their features must be detached."""
    return softplus(fake).mean() + softplus(-real).mean()


def clamp_ratio(adversarial: Tensor, other: Tensor, band: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale `adversarial` per sample so that its norm over the norm of `other` lies within `band`; returns (scaled, ratio, ratio before).

    Directions at x0 [B, C, h, w], ratios [B]. Where `other` is zero, because a node has an adversarial weight alone, the norm of a
    tensor of ones takes its place: the scale of the normalised matching term (our choice).
    """
    size, reference = adversarial.flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    reference = torch.where(reference > 0, reference, other[0].numel() ** 0.5)
    raw = size / reference.clamp_min(1e-12)
    ratio = raw.clamp(*band)
    scale = ratio * reference / size.clamp_min(1e-12)
    return scale[:, None, None, None] * adversarial, ratio, raw
