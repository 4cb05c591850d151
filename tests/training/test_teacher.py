"""The teacher's training: which encoder a sample is denied, what an optimizer gets, and what must not move."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flashgen.models.build import build_pipeline
from flashgen.models.specs import SPECS
from flashgen.models.text import encode_prompts
from flashgen.recipe.schema import EncoderTraining, FlowTraining
from flashgen.shapes.scene import parse, prompt_set
from flashgen.training import loop, teacher
from flashgen.training.encoders import FIELDS, PHRASES, meaning, phrases, train_encoders
from flashgen.training.optimizers import muon_and_adamw
from flashgen.training.schedule import cosine, hold_then_decay, set_rates
from flashgen.training.teacher import drop_encoders, train_flow

PROMPTS = ["a red circle left of a blue square", "", "two circles", "four purple crosses on a gray background"]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    return build_pipeline(SPECS["tiny"], 0)


def frozen(pipe: StableDiffusion3Pipeline, *names: str) -> list[torch.Tensor]:
    return [p.detach().clone() for name in names for p in getattr(pipe, name).parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Where each encoder's part is: (rows of the sequence, columns of the features, columns of pooled).
CLIP, T5 = slice(0, 16), slice(16, 32)
PARTS = [(CLIP, slice(0, 16), slice(0, 16)), (CLIP, slice(16, 32), slice(16, 32)), (T5, slice(0, 32), slice(0, 0))]


@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["clip-l", "clip-g", "t5"])
def test_keep_mask_drops_exactly_one_encoder_of_one_sample(dropped: int, pipe: StableDiffusion3Pipeline) -> None:
    whole = encode_prompts(pipe, PROMPTS, 16)
    keep = torch.ones(4, 3)
    keep[2, dropped] = 0
    less = drop_encoders(whole, keep, 16, 16, 16)
    for number, (rows, columns, pooled) in enumerate(PARTS):
        for sample in range(4):
            gone = sample == 2 and number == dropped
            assert not whole.embeds[sample, rows, columns].eq(0).all()
            assert torch.equal(less.embeds[sample, rows, columns], whole.embeds[sample, rows, columns] * (not gone))
            assert torch.equal(less.pooled[sample, pooled], whole.pooled[sample, pooled] * (not gone))


def test_each_parameter_has_exactly_one_optimizer_and_muon_gets_matrices_of_blocks(pipe: StableDiffusion3Pipeline) -> None:
    groups = [[p for g in o.param_groups for p in g["params"]] for o in muon_and_adamw(pipe.transformer, 1e-2, 1e-3)]
    names = {id(p): n for n, p in pipe.transformer.named_parameters()}
    assert sorted(id(p) for group in groups for p in group) == sorted(names)
    assert all(p.ndim == 2 and "transformer_blocks" in names[id(p)] for p in groups[0]) and len(groups[0]) > 20


@pytest.fixture
def data() -> tuple[torch.Tensor, list[str]]:
    captions = [r.caption() for r in prompt_set(0, 2)]
    return torch.randn(len(captions), 16, 4, 4, generator=torch.Generator().manual_seed(0)), captions


def test_flow_training_moves_the_transformer_only_and_resumes_bit_for_bit(
    pipe: StableDiffusion3Pipeline, data: tuple[torch.Tensor, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FlowTraining(steps=4, batch=4, compile=False)
    still, start = frozen(pipe, *ENCODERS, "vae"), copy.deepcopy(pipe.transformer)

    def train(work: Path) -> list[torch.Tensor]:
        pipe.transformer.load_state_dict(start.state_dict())
        ema = train_flow(pipe, *data, config, 0, work)
        return frozen(pipe, "transformer") + list(ema.shadow.values())

    expected = train(tmp_path / "whole")
    assert same(frozen(pipe, *ENCODERS, "vae"), still)
    assert not same(expected[: len(list(start.parameters()))], [p.detach() for p in start.parameters()])

    monkeypatch.setattr(teacher, "fit", lambda *a, **k: loop.fit(*a, **k, save_every_s=0.0))

    def interrupted(*arguments: object, where: str, **options: object) -> float:
        if where == "teacher step 2":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.setattr(teacher, "descend", loop.descend)
    assert same(train(tmp_path / "cut"), expected)


def test_encoder_training_moves_encoders_only_and_ends_frozen(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    still, before = frozen(pipe, "transformer", "vae"), {name: frozen(pipe, name) for name in ENCODERS}
    table = pipe.text_encoder.text_model.embeddings.position_embedding.weight.detach().clone()
    train_encoders(pipe, EncoderTraining(steps=2, batch=4), 16, 0, tmp_path)
    assert same(frozen(pipe, "transformer", "vae"), still)
    assert not any(same(frozen(pipe, name), before[name]) for name in ENCODERS)
    assert torch.equal(pipe.text_encoder.text_model.embeddings.position_embedding.weight, table)
    assert not any(p.requires_grad for name in ENCODERS for p in getattr(pipe, name).parameters())
    row = json.loads((tmp_path / "stats.jsonl").read_text())
    assert row["loss"] == pytest.approx(row["grammar"] + row["words"], rel=1e-5)


def test_meaning_tells_all_captions_apart() -> None:
    requests = prompt_set(1, 60)
    told = {tuple(map(tuple, meaning(r, 16))): r.caption() for r in requests}
    assert len(told) == len({r.caption() for r in requests})
    assert all(0 <= index < len(values) for key in told for token in key for index, values in zip(token, FIELDS, strict=True))


def test_each_word_means_its_own_group_and_every_token_the_background() -> None:
    request = parse("a red circle left of two squares on a black background")
    said = [tuple(values[i] for i, values in zip(token, FIELDS, strict=True)) for token in meaning(request, 11)]
    assert said[:3] == [("circle", "red", 1, "left of", "black")] * 3
    assert said[5:7] == [("square", None, 2, "right of", "black")] * 2
    assert said[3:5] + said[7:] == [(None, None, None, None, "black")] * 6


def test_pooled_vectors_are_soft(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    train_encoders(pipe, EncoderTraining(steps=1, batch=4, pooled_norm=0.5), 16, 0, tmp_path)
    pooled = encode_prompts(pipe, [r.caption() for r in prompt_set(0, 40)], 16).pooled
    for part in torch.split(pooled, 16, -1):
        assert part.norm(dim=-1).mean().item() == pytest.approx(0.5, rel=1e-4)


def test_phrases_know_which_colour_a_shape_has_but_not_its_place() -> None:
    one, swapped, moved, mirrored = (
        phrases(parse(f"a {text}"))
        for text in ("red circle left of a blue cross", "blue circle left of a red cross", "red circle below a blue cross",
                     "blue cross left of a red circle")
    )  # fmt: skip
    assert one != swapped and one == moved == mirrored
    assert {PHRASES[i] for i, there in enumerate(one) if there} == {("circle", "red"), ("cross", "blue")}


def test_learning_rates_warm_up_and_end_at_their_floor(pipe: StableDiffusion3Pipeline) -> None:
    cosines = [cosine(step, 100, warmup=10) for step in range(100)]
    holds = [hold_then_decay(step, 100, warmup=10, decay_share=0.3) for step in range(100)]
    for shares in (cosines, holds):
        assert shares[0] == 0.1 and shares[9] == 1 == max(shares)
        assert shares[10:] == sorted(shares[10:], reverse=True) and 0.02 <= shares[-1] < 0.075
    assert holds[69] == 1 > holds[75] and cosines[54] == pytest.approx(0.51, abs=0.025)
    muon, adamw = muon_and_adamw(pipe.transformer, 0.1, 0.01)
    for share in (0.5, 0.25):  # of what they were made with, not of what they have
        set_rates([muon, adamw], share)
        assert [optimizer.param_groups[0]["lr"] for optimizer in (muon, adamw)] == [0.1 * share, 0.01 * share]
