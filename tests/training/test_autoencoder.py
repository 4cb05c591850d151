"""The autoencoder's training and the latents of its data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.specs import SPECS
from flashgen.judges.base import Pictures
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import AutoencoderTraining
from flashgen.training.autoencoder import encode_pictures, picture_batch, to_tensor, train_autoencoder
from flashgen.worlds.shapes.data import ShapesData


def test_crops_are_parts_of_the_pictures_that_the_step_draws() -> None:
    data, rng = ShapesData(), np.random.default_rng([3, 1, 7])
    full, crops = to_tensor(data.pictures(rng, 2)), picture_batch(data, 3, 7, 2, 32)
    assert crops.shape == (2, 3, 32, 32) and full.min() >= -1 and full.max() <= 1
    for picture, crop in zip(full, crops, strict=True):
        windows = picture.unfold(1, 32, 1).unfold(2, 32, 1)
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()
    assert torch.equal(picture_batch(data, 3, 7, 2, None), full) and not torch.equal(picture_batch(data, 3, 8, 2, None), full)


def test_training_lowers_the_error_and_takes_as_many_pixels_with_crops_as_without(tmp_path: Path) -> None:
    vae, sizes = build_pipeline(SPECS["tiny"], 0).vae, list[tuple[int, ...]]()
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape)))
    x = to_tensor(ShapesData().pictures(np.random.default_rng(0), 4))

    def error() -> float:
        with torch.no_grad():
            return float((vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean())

    before = error()
    sizes.clear()
    train_autoencoder(vae, ShapesData(), AutoencoderTraining(steps=40, batch=8, crop_share=0.5), 0, tmp_path, CheckpointRecipe())
    assert sizes == [(8, 3, 32, 32)] * 20 + [(2, 3, 64, 64)] * 20 and error() < 0.9 * before


def test_latents_are_normalised_kept_and_belong_to_their_captions(tmp_path: Path) -> None:
    class Counted(ShapesData):
        calls = 0

        def captioned_pictures(self, rng: np.random.Generator, count: int) -> tuple[Pictures, list[str]]:
            self.calls += 1
            return super().captioned_pictures(rng, count)

    pipe, data = build_pipeline(SPECS["tiny"], 0), Counted()
    latents, captions = encode_pictures(pipe, data, 70, 0, tmp_path)
    assert latents.shape == (70, 16, 8, 8) and len(captions) == 70 and data.calls == 2
    assert latents.mean().item() == pytest.approx(0, abs=1e-3) and latents.std().item() == pytest.approx(1, abs=1e-3)
    pictures, texts = ShapesData().captioned_pictures(np.random.default_rng([0, 2]), 64)
    with torch.no_grad():
        assert torch.allclose(pipe.family.to_latents(pipe.vae, to_tensor(pictures)), latents[:64], atol=0.02)
    assert captions[:64] == texts
    again, _ = encode_pictures(build_pipeline(SPECS["tiny"], 0), data, 70, 0, tmp_path)
    assert torch.equal(again, latents) and data.calls == 2
