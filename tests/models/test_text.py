"""Prompt encoding is diffusers' own, bit for bit, with and without T5."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flashgen.models.text import Conditioning, encode_prompts

PROMPTS = ["a red circle left of a blue square on a white background", "", "two circles", "four purple crosses and a dog " * 3]


def reference(pipe: StableDiffusion3Pipeline, t5_tokens: int) -> Conditioning:
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_tokens)
    return Conditioning(embeds, pooled)


@pytest.mark.parametrize(
    ("with_t5", "t5_tokens"), [(True, 16), (True, 9), (False, 16), (False, 0)], ids=["full", "short", "zeros", "prune"]
)
def test_encode_equals_the_pipelines_own_bit_for_bit(with_t5: bool, t5_tokens: int, pipe: StableDiffusion3Pipeline) -> None:
    if not with_t5:
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    expected = reference(pipe, t5_tokens)
    ours = encode_prompts(pipe, PROMPTS, t5_tokens)
    assert torch.equal(ours.embeds, expected.embeds) and torch.equal(ours.pooled, expected.pooled)
    assert ours.embeds.shape == (4, 16 + t5_tokens, 32) and ours.pooled.shape == (4, 32)
    assert (ours.embeds[:, 16:] == 0).all().item() is not (with_t5 and t5_tokens > 0)


def test_encode_prompts_does_not_depend_on_the_batch(pipe: StableDiffusion3Pipeline) -> None:
    whole, parts = encode_prompts(pipe, PROMPTS, 16), encode_prompts(pipe, PROMPTS, 16, batch=3)
    assert torch.allclose(whole.embeds, parts.embeds, atol=1e-5) and torch.allclose(whole.pooled, parts.pooled, atol=1e-5)


def test_without_t5_is_what_a_pipeline_without_t5_sees(pipe: StableDiffusion3Pipeline) -> None:
    full = encode_prompts(pipe, PROMPTS, 16)
    rows = torch.tensor([True, False, False, True])
    mixed = full.without_t5(rows, 16)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    absent = encode_prompts(pipe, PROMPTS, 16)
    assert torch.equal(mixed.embeds[rows], absent.embeds[rows]) and torch.equal(mixed.embeds[~rows], full.embeds[~rows])
    assert torch.equal(mixed.pooled, absent.pooled)
