"""Prompt encoding is diffusers' own, bit for bit, with and without T5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen.families.conditioning import concatenate
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts
from tests.conftest import tiny_sampler
from tests.peers import in_diffusers

PROMPTS = ["a red circle left of a blue square on a white background", "", "two circles", "four purple crosses and a dog " * 3]


def reference(pipe: Pipeline, t5_tokens: int) -> dict[str, Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = in_diffusers(pipe).encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_tokens
        )
    return {"embeds": embeds, "pooled": pooled}


def without_t5(pipe: Pipeline) -> Pipeline:
    return Pipeline(pipe.family, pipe.folder, {**pipe.parts, "text_encoder_3": None, "tokenizer_3": None})


def tokens(t5: int) -> Any:
    return tiny_sampler(tokens={"clip": 16, "t5": t5})


@pytest.mark.parametrize(
    ("with_t5", "t5_tokens"), [(True, 16), (True, 9), (False, 16), (False, 0)], ids=["full", "short", "zeros", "prune"]
)
def test_encode_equals_the_pipelines_own_bit_for_bit(with_t5: bool, t5_tokens: int, pipe: Pipeline) -> None:
    pipe = pipe if with_t5 else without_t5(pipe)
    expected, ours = reference(pipe, t5_tokens), encode_prompts(pipe, PROMPTS, tokens(t5_tokens))
    assert ours.tensors.keys() == expected.keys() and all(torch.equal(ours.tensors[name], expected[name]) for name in expected)
    assert ours.tensors["embeds"].shape == (4, 16 + t5_tokens, 32) and ours.tensors["pooled"].shape == (4, 32)
    assert len(ours) == 4
    assert (ours.tensors["embeds"][:, 16:] == 0).all().item() is not (with_t5 and t5_tokens > 0)


def test_encode_prompts_does_not_depend_on_the_batch(pipe: Pipeline) -> None:
    whole, parts = encode_prompts(pipe, PROMPTS, tokens(16)), encode_prompts(pipe, PROMPTS, tokens(16), batch=3)
    assert all(torch.allclose(whole.tensors[name], parts.tensors[name], atol=1e-5) for name in whole.tensors)


def test_dropping_t5_gives_what_a_pipeline_without_t5_sees(pipe: Pipeline) -> None:
    full = encode_prompts(pipe, PROMPTS, tokens(16))
    rows = torch.tensor([True, False, False, True])
    mixed, absent = full.drop("text_encoder_3", rows), encode_prompts(without_t5(pipe), PROMPTS, tokens(16))
    embeds = mixed.tensors["embeds"]
    assert torch.equal(embeds[rows], absent.tensors["embeds"][rows]) and torch.equal(embeds[~rows], full.tensors["embeds"][~rows])
    assert torch.equal(mixed.tensors["pooled"], absent.tensors["pooled"])
    assert mixed.has("text_encoder_3").tolist() == [False, True, True, False] and full.has("text_encoder_3").all()


@pytest.mark.parametrize(("encoder", "number"), [("text_encoder", 0), ("text_encoder_2", 1)])
def test_the_share_of_a_clip_is_its_features_and_its_pooled_vector(encoder: str, number: int, pipe: Pipeline) -> None:
    full, every = encode_prompts(pipe, PROMPTS, tokens(16)), torch.ones(4, dtype=torch.bool)
    dropped = full.drop(encoder, every)
    with torch.no_grad():
        out = pipe[encoder](**pipe.family.tokenize(pipe, PROMPTS, tokens(16))[encoder], output_hidden_states=True)
    lost = {name: (full.tensors[name] - dropped.tensors[name]) for name in full.tensors}
    width = out.text_embeds.shape[-1]
    own = slice(number * width, (number + 1) * width)  # both CLIPs are as wide as their pooled vectors here
    assert torch.equal(lost["embeds"][:, :16, own], out.hidden_states[-2]) and torch.equal(lost["pooled"][:, own], out.text_embeds)
    assert lost["embeds"].abs().sum() == out.hidden_states[-2].abs().sum() and not dropped.has(encoder).any()
    assert full.has(encoder).all()


def test_conditioning_rows_types_and_copies(pipe: Pipeline) -> None:
    cond = encode_prompts(pipe, PROMPTS, tokens(16))
    again = concatenate([cond[:1], cond[torch.tensor([1, 2])], cond[3:]])
    assert all(torch.equal(again.tensors[name], cond.tensors[name]) for name in cond.tensors)
    half = cond.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.bfloat16}
    three = cond[1:2].expand(3)
    assert len(three) == 3 and all(torch.equal(tensor[2], cond.tensors[name][1]) for name, tensor in three.tensors.items())
    three.drop("text_encoder_3", torch.tensor([True, False, False]))
    assert torch.equal(three.tensors["embeds"][0], cond.tensors["embeds"][1])  # drop copies
