"""Distances between sets of pictures, in a feature space that needs no downloaded network.

The space, called VAE-PCA64: posterior means of the teacher's own autoencoder, averaged 2 x 2, projected on the 64 leading
principal axes of a reference set. Numbers in it compare with each other, not with an Inception FID.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Features = NDArray[np.float64]
DIMENSIONS = 64


@torch.no_grad()
def pooled_latents(vae: AutoencoderKL, images: NDArray[np.uint8], batch: int = 128) -> Features:
    """Features [N, D] of pictures uint8 [N, H, W, 3]: latents of `vae`, averaged 2 x 2."""
    parts = []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).float().permute(0, 3, 1, 2) / 127.5 - 1
        parts.append(torch.nn.functional.avg_pool2d(vae.encode(x).latent_dist.mean, 2).flatten(1))
    return torch.cat(parts).double().numpy()


@dataclass(frozen=True)
class Space:
    """Principal axes of a reference set: `mean` [D], `axes` [D, 64]."""

    mean: Features
    axes: Features

    @classmethod
    def of(cls, reference: Features, dimensions: int = DIMENSIONS) -> Space:
        """The space of the `dimensions` leading axes of `reference` [N, D]."""
        mean = reference.mean(0)
        _, axes = np.linalg.eigh(np.cov(reference - mean, rowvar=False))
        return cls(mean, axes[:, ::-1][:, :dimensions])

    def __call__(self, features: Features) -> Features:
        """Coordinates [N, 64] of features [N, D]."""
        return np.asarray((features - self.mean) @ self.axes)


def frechet_distance(a: Features, b: Features) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets [N, D] (Heusel et al. 2017)."""
    c_a, c_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = scipy.linalg.sqrtm(c_a @ c_b)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b) - 2 * np.trace(np.real(root)))


def recall(real: Features, fake: Features, neighbours: int = 3) -> float:
    """Share of real samples within the k-nearest-neighbour ball of any fake sample (Kynkaanniemi et al. 2019)."""
    radii = np.sort(cdist(fake, fake), 1)[:, neighbours]
    return float((cdist(real, fake) <= radii).any(1).mean())


def diversity(groups: Features) -> float:
    """Mean distance between two samples of one prompt, averaged over prompts, of `groups` [prompts, seeds, D]."""
    count = groups.shape[1]
    pairs = np.triu_indices(count, 1)
    return float(np.mean([cdist(group, group)[pairs].mean() for group in groups]))
