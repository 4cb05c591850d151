"""The adversarial term in latent space, on features of the proxy (SD3.5-Flash; LADD, NitroFusion before it).

Losses take logits [B, heads]; `training.discriminator` makes them from hidden states of the proxy's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


def generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-logit): non-saturating. Gradient: through `fake` to the sample."""
    return softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(logit of fake) + softplus(-logit of real). Gradient: the heads, whose features must be detached."""
    return softplus(fake).mean() + softplus(-real).mean()


def banded(adversarial: Tensor, other: Tensor, band: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """`adversarial` scaled so that its size stays within `band` of the size of `other`, sample by sample; that ratio, and the one before.

    Both are directions at x0 [B, C, H, W], ratios [B]. Where `other` is zero, at a node with an adversarial weight alone, 1 an element
    stands for its size, which is the scale of the normalised matching term (our choice).
    """
    size, against = adversarial.flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    against = torch.where(against > 0, against, other[0].numel() ** 0.5)
    raw = size / against.clamp_min(1e-12)
    ratio = raw.clamp(*band)
    scale = ratio * against / size.clamp_min(1e-12)
    return scale[:, None, None, None] * adversarial, ratio, raw
