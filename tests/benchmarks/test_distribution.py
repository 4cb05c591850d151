"""Closed forms of the distances between sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks.distribution import Space, diversity, frechet_distance, pooled_latents, recall
from flashgen.families.sd3.specs import SPECS


def gaussian(mean: np.ndarray, sd: np.ndarray, n: int = 4000, seed: int = 0) -> np.ndarray:
    """Samples with exactly that mean and diagonal covariance."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return np.asarray(mean + sd * x)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    a = gaussian(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    b = gaussian(np.array([3.0, 1.0]), np.array([2.0, 0.5]), seed=1)
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 2) ** 2 + (2 - 0.5) ** 2, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_recall_falls_when_a_mode_is_missing() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(-5, 1, (400, 2)), rng.normal(5, 1, (400, 2))
    real, both = np.concatenate([left, right]), np.concatenate([rng.normal(-5, 1, (400, 2)), rng.normal(5, 1, (400, 2))])
    assert recall(real, both) > 0.9
    assert recall(real, rng.normal(-5, 1, (800, 2))) == pytest.approx(0.5, abs=0.05)
    assert recall(real, np.full((50, 2), 100.0)) == 0


def test_diversity_is_the_mean_pair_distance_within_a_prompt() -> None:
    groups = np.array([[[0.0], [1.0], [3.0]], [[10.0], [10.0], [10.0]]])
    assert diversity(groups) == pytest.approx((2.0 + 0.0) / 2)


def test_the_space_keeps_the_largest_axes() -> None:
    reference = gaussian(np.array([1.0, 2.0, 3.0]), np.array([0.1, 5.0, 1.0]))
    space = Space.of(reference, 2)
    found = space(reference)
    assert found.shape == (4000, 2) and np.allclose(found.mean(0), 0, atol=1e-9)
    assert np.allclose(found.std(0), [5.0, 1.0], rtol=1e-3)


def test_features_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**SPECS["tiny"].vae).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    whole, parts = pooled_latents(vae, images), pooled_latents(vae, images, batch=2)
    assert whole.shape == (5, 16 * 4 * 4) and np.allclose(whole, parts, atol=1e-5)
