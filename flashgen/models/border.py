"""The check of a pipeline that comes from outside, before anything is copied or computed."""

from __future__ import annotations

from pathlib import Path

import torch

from flashgen.artifact.files import SOURCE
from flashgen.artifact.manifest import Sampler
from flashgen.errors import ArtifactError, foreign
from flashgen.families.base import Family, velocity
from flashgen.models.pipeline import SENTENCE, Pipeline, load_pipeline
from flashgen.models.prompts import encode_prompts


@torch.no_grad()
def check_pipeline(folder: Path) -> tuple[Family, Sampler]:
    """Family and default sampler of the diffusers pipeline in `folder`, after a pass of every network without weights.

    The pass, on torch's device `meta`, draws a picture of a sentence: it finds configs, tokenizers and networks that do not fit each other
    in seconds. Raises ArtifactError naming what is at fault.
    """
    pipe = load_pipeline(folder, weights="none", device=torch.device("meta"))
    family = pipe.family
    with foreign(lambda why: ArtifactError(f"{folder} does not say how it is sampled ({why}); {SOURCE}")):
        sampler = family.import_sampler(folder)
    for network in pipe.networks():
        network.to("meta")
    with foreign(lambda why: ArtifactError(f"the networks of {folder} do not fit each other ({why}); {SOURCE}")):
        try:
            _draw(pipe, sampler)
        except RuntimeError as error:
            if "meta tensor" not in str(error):  # a network that looks at values, as BERT does at its mask, cannot pass without them
                raise
    return family, sampler


def _draw(pipe: Pipeline, sampler: Sampler) -> None:
    """Draw a picture on `meta`. Raises whatever torch does for networks that do not fit each other."""
    family, size = pipe.family, sampler.size_px
    cond = encode_prompts(pipe, [SENTENCE], sampler)
    x = torch.empty(1, *family.latent_shape(pipe.configs, size), device="meta")
    picture = family.from_latents(pipe.vae, velocity(pipe.transformer, x, torch.empty(1, device="meta"), cond))
    if picture.shape != (1, 3, size.height, size.width):
        raise ValueError(f"a picture of {size} px comes out as {list(picture.shape)}")
    family.to_latents(pipe.vae, picture)
