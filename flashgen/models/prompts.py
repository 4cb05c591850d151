"""Encoding prompts with the text encoders of a pipeline. The only place in flashgen where prompts are encoded in torch."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from flashgen.artifact.files import SOURCE
from flashgen.artifact.manifest import Sampler
from flashgen.device.tokens import warn_cut
from flashgen.errors import ArtifactError, foreign
from flashgen.families.conditioning import Conditioning, concatenate
from flashgen.models.pipeline import Pipeline
from flashgen.pixels import slices

BATCH = 32  # prompts encoded together: one pass over weights that stay on disk


@torch.no_grad()
def encode_prompts(pipe: Pipeline, prompts: list[str], sampler: Sampler, batch: int = BATCH) -> Conditioning:
    """Conditioning of `prompts` in fp32 on the pipeline's device, exactly as the family's diffusers pipeline encodes them."""
    family = pipe.family
    parts = []
    for rows in slices(len(prompts), batch):
        with tokenizing(pipe):
            inputs = family.tokenize(pipe, prompts[rows], sampler)
        moved = {encoder: {name: ids.to(pipe.device) for name, ids in given.items()} for encoder, given in inputs.items()}
        parts.append(family.encode(pipe, moved, sampler))
    return concatenate(parts)


def warn_of_cuts(pipe: Pipeline, prompts: list[str], sampler: Sampler) -> None:
    """Warn about every prompt that is longer than a tokenizer's limit, as `device.tokens` does."""
    for name, encoder in pipe.family.text_encoders.items():
        if pipe[name] is None:
            continue
        limit = sampler.tokens[encoder.tokens]
        with tokenizing(pipe):
            encoded = pipe[encoder.tokenizer](prompts, verbose=False).input_ids
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > limit:
                warn_cut(prompt, encoder.tokenizer, len(ids), limit)


def tokenizing(pipe: Pipeline) -> AbstractContextManager[None]:
    """Turn any error of a tokenizer of `pipe` inside into an ArtifactError."""
    return foreign(lambda why: ArtifactError(f"a tokenizer of {pipe.folder} fails ({why}); {SOURCE}"))
