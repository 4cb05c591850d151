from __future__ import annotations

import pytest
from diffusers import StableDiffusion3Pipeline

from flashgen.models.build import build_pipeline
from flashgen.models.specs import SPECS


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    tiny = build_pipeline(SPECS["tiny"], 0)
    for part in (tiny.text_encoder, tiny.text_encoder_2, tiny.text_encoder_3, tiny.transformer):
        part.eval()
    return tiny
