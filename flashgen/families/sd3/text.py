"""Prompt encoding exactly as `StableDiffusion3Pipeline.encode_prompt` does it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.families.base import Family
from flashgen.families.conditioning import Conditioning, Index
from flashgen.models.pipeline import Pipeline

CLIPS = ("text_encoder", "text_encoder_2")


def tokenize(pipe: Pipeline, prompts: list[str], sampler: Sampler) -> dict[str, dict[str, Tensor]]:
    """Token ids [B, L] of every text encoder that `pipe` has, padded and cut to its length."""
    found = {}
    for name, encoder in pipe.family.text_encoders.items():
        if pipe[name] is not None:
            length = sampler.tokens[encoder.tokens]
            batch = pipe[encoder.tokenizer](prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            found[name] = {"input_ids": batch.input_ids}
    return found


def encode(family: Family, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]], sampler: Sampler) -> Conditioning:
    """`embeds` [B, L_clip + L_t5, D] and `pooled` [B, P], fp32.

    Without T5 its positions are zeros; with a T5 length of 0 (encoder mode `prune`) they are absent.
    """
    clip, pooled = [], []
    for name in CLIPS:
        out = pipe[name](**inputs[name], output_hidden_states=True)
        clip.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    width = pipe.transformer.config.joint_attention_dim
    features = torch.cat(clip, -1)
    features = torch.nn.functional.pad(features, (0, width - features.shape[-1]))
    if "text_encoder_3" in inputs:
        t5 = pipe["text_encoder_3"](**inputs["text_encoder_3"])[0]
    else:
        t5 = features.new_zeros(len(features), sampler.tokens["t5"], width)
    tensors = {"embeds": torch.cat([features, t5], 1).float(), "pooled": torch.cat(pooled, -1).float()}
    return Conditioning(family, tensors, shares(sampler.tokens["clip"], clip[0].shape[-1], clip[1].shape[-1], pooled[0].shape[-1]))


def shares(clip_tokens: int, width_l: int, width_g: int, pooled_l: int) -> dict[str, dict[str, Index]]:
    """Where each encoder's output lies: CLIP-L and CLIP-G side by side in the first tokens and in `pooled`, T5 in the other tokens."""
    first = slice(0, clip_tokens)
    return {
        "text_encoder": {"embeds": (first, slice(0, width_l)), "pooled": (slice(0, pooled_l),)},
        "text_encoder_2": {"embeds": (first, slice(width_l, width_l + width_g)), "pooled": (slice(pooled_l, None),)},
        "text_encoder_3": {"embeds": (slice(clip_tokens, None),)},
    }
