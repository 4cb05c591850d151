"""Pretraining of the text encoders: what must not move, and how long pooled vectors are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.pretraining import train_encoders
from flashgen.families.sd3.sampling import teacher_sampler
from flashgen.families.sd3.specs import SPECS
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.pixels import Size
from flashgen.recipe.teacher import EncoderTraining
from flashgen.worlds import get
from flashgen.worlds.shapes.data import WORDS, ShapesData

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SAMPLER = teacher_sampler(16, 16, Size(64, 64))
HELD_OUT = get("shapes").prompts(0, 40)


@pytest.fixture
def pipe() -> Pipeline:
    return build_pipeline(SPECS["tiny"], 0, WORDS)


def weights(pipe: Pipeline, *names: str) -> list[Tensor]:
    return [p.detach().clone() for name in names for p in pipe[name].parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_encoder_training_moves_encoders_only_and_ends_frozen(pipe: Pipeline, tmp_path: Path) -> None:
    still, before = weights(pipe, "transformer", "vae"), {name: weights(pipe, name) for name in ENCODERS}
    table = pipe["text_encoder"].text_model.embeddings.position_embedding.weight.detach().clone()
    train_encoders(pipe, ShapesData(), HELD_OUT, EncoderTraining(steps=2, batch=4), SAMPLER, 0, tmp_path)
    assert same(weights(pipe, "transformer", "vae"), still)
    assert not any(same(weights(pipe, name), before[name]) for name in ENCODERS)
    assert torch.equal(pipe["text_encoder"].text_model.embeddings.position_embedding.weight, table)
    assert not any(p.requires_grad for name in ENCODERS for p in pipe[name].parameters())
    row = json.loads((tmp_path / "stats.jsonl").read_text())
    assert row["loss"] == pytest.approx(row["grammar"] + row["words"], rel=1e-5)


def test_pooled_vectors_have_the_length_of_the_recipe(pipe: Pipeline, tmp_path: Path) -> None:
    train_encoders(pipe, ShapesData(), HELD_OUT, EncoderTraining(steps=1, batch=4, vector_norm=0.5), SAMPLER, 0, tmp_path)
    pooled = encode_prompts(pipe, HELD_OUT, SAMPLER).tensors["pooled"]
    for part in torch.split(pooled, 16, -1):
        assert part.norm(dim=-1).mean().item() == pytest.approx(0.5, rel=1e-4)
