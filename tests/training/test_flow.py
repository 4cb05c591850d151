"""The teacher's training: what an optimizer step must not move, and which encoder a sample goes without."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.sampling import teacher_sampler
from flashgen.families.sd3.specs import SPECS
from flashgen.models.pipeline import Pipeline
from flashgen.pixels import Size
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import FlowTraining
from flashgen.training import flow, loop
from flashgen.training.flow import train_flow

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SAMPLER = teacher_sampler(16, 16, Size(64, 64))
EVERY_STEP = CheckpointRecipe.model_construct(every_s=0.0, share=1e9)
CAPTIONS = ["a red circle left of a blue square", "two circles", "four purple crosses on a gray background", "two circles"]


@pytest.fixture
def pipe() -> Pipeline:
    return build_pipeline(SPECS["tiny"], 0)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(len(CAPTIONS), 16, 4, 4, generator=torch.Generator().manual_seed(0))


def frozen(pipe: Pipeline, *names: str) -> list[Tensor]:
    return [p.detach().clone() for name in names for p in pipe[name].parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_flow_training_moves_the_transformer_only_and_resumes_bit_for_bit(
    pipe: Pipeline, latents: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FlowTraining(steps=4, batch=4, compile=False)
    still, start = frozen(pipe, *ENCODERS, "vae"), copy.deepcopy(pipe.transformer)

    def train(work: Path) -> list[Tensor]:
        pipe.transformer.load_state_dict(start.state_dict())
        ema = train_flow(pipe, latents, CAPTIONS, config, SAMPLER, 0, work, EVERY_STEP)
        return frozen(pipe, "transformer") + list(ema.shadow.values())

    expected = train(tmp_path / "whole")
    assert same(frozen(pipe, *ENCODERS, "vae"), still)
    assert not same(expected[: len(list(start.parameters()))], [p.detach() for p in start.parameters()])

    def interrupted(*arguments: object, where: str, **options: object) -> tuple[Tensor, Tensor]:
        if where == "teacher step 2":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(flow, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.setattr(flow, "descend", loop.descend)
    assert same(train(tmp_path / "cut"), expected)


def test_each_text_encoder_is_dropped_independently_and_captions_as_often_as_the_recipe_says(
    pipe: Pipeline, latents: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Conditioning] = []

    def watched(net: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond)
        return velocity(net, x, sigma, cond)

    monkeypatch.setattr(flow, "velocity", watched)

    def train(name: str, **changes: float) -> Conditioning:
        config = FlowTraining(steps=1, batch=600, compile=False, **changes)
        train_flow(pipe, latents, CAPTIONS, config, SAMPLER, 0, tmp_path / name, EVERY_STEP)
        return seen.pop()

    cond = train("encoders", encoder_drop=0.5, caption_drop=0.0)
    has = torch.stack([cond.has(name) for name in ENCODERS], 1)
    assert (has.float().mean(0) - 0.5).abs().max() < 0.07
    assert {tuple(row) for row in has.tolist()} == {(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)}
    pooled = train("captions", encoder_drop=0.0, caption_drop=0.25).tensors["pooled"]
    values, counts = torch.unique(pooled, dim=0, return_counts=True)
    assert len(values) == 4 and sorted((counts / 600).tolist())[2] == pytest.approx(0.25, abs=0.06)  # "two circles" comes twice
