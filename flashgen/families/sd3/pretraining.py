"""Pretraining SD3's three small text encoders on a world's captions alone; flow training then leaves them frozen, as SD3 does.

The three differ in what they know, as the real ones do. T5-type: the whole grammar. CLIP-G-type: a bag of phrases, so which
colour a shape has, but not what is left of what. CLIP-L-type: a bag of words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from flashgen.artifact.manifest import Sampler
from flashgen.models.pipeline import Pipeline
from flashgen.recipe.teacher import EncoderTraining
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.schedule import cosine, set_rates
from flashgen.worlds.base import TeacherData

ENCODER_STREAM = 4


def train_encoders(
    pipe: Pipeline, data: TeacherData, held_out: Sequence[str], config: EncoderTraining, sampler: Sampler, seed: int, work: Path
) -> None:
    """Train the encoders to tell what captions say, then scale the pooled vectors on the captions `held_out`.

    Gradient: the three encoders (not CLIP's position tables) and linear heads that are thrown away.
    """
    torch.manual_seed(seed)
    encoders = {name: pipe[name] for name in pipe.family.text_encoders}
    length = sampler.tokens["t5"]
    heads = nn.ModuleDict({"text_encoder_3": nn.Linear(encoders["text_encoder_3"].config.d_model, sum(data.field_sizes))})
    for name, known in (("text_encoder", len(data.words)), ("text_encoder_2", len(data.words) + data.num_phrases)):
        heads[name] = nn.Linear(encoders[name].config.projection_dim, known)
    module = nn.ModuleDict({**encoders, "heads": heads})
    for encoder in encoders.values():
        encoder.requires_grad_(True)
    parameters = [p for n, p in module.named_parameters() if "position_embedding" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=0.0)

    def step_fn(step: int) -> dict[str, Metric]:
        requests = data.draw(np.random.default_rng([seed, ENCODER_STREAM, step]), config.batch)
        captions = [data.caption(request) for request in requests]
        ids = pipe.family.tokenize(pipe, captions, sampler)
        set_rates([optimizer], cosine(step, config.steps, warmup=config.warmup, floor=config.lr_floor))
        targets = torch.tensor([data.token_classes(request, length) for request in requests])
        logits = heads["text_encoder_3"](encoders["text_encoder_3"](**ids["text_encoder_3"])[0])
        grammar = torch.stack([cross_entropy(part.transpose(1, 2), want) for part, want in _fields(logits, targets, data)]).mean()
        present = torch.tensor([[float(word in caption.split()) for word in data.words] for caption in captions])
        phrases = torch.tensor([data.phrases(request) for request in requests])
        wanted = {"text_encoder": present, "text_encoder_2": torch.cat([present, phrases], 1)}
        words = [
            binary_cross_entropy_with_logits(heads[name](encoders[name](**ids[name]).text_embeds), want) for name, want in wanted.items()
        ]
        loss = grammar + sum(words)
        value, norm = descend([loss], parameters, [optimizer], clip=config.clip, where=f"encoder step {step}")
        return {"loss": value, "grammar": grammar.item(), "words": sum(w.item() for w in words), "grad_norm": norm}

    fit("encoders", config.steps, step_fn, {"module": module, "optimizer": optimizer}, work)
    for encoder in encoders.values():
        encoder.requires_grad_(False)
    ids = pipe.family.tokenize(pipe, list(held_out), sampler)
    for name in ("text_encoder", "text_encoder_2"):
        _soften(encoders[name], ids[name]["input_ids"], config.vector_norm)


@torch.no_grad()
def _soften(encoder: nn.Module, ids: Tensor, norm: float) -> None:
    """Scale the projection so that pooled vectors have length `norm` on average.

    A long pooled vector tells every image token the same through adaLN, long before attention has learned to tell tokens
    different things, and then a model knows which colours there are but not which shape has which (docs/lab-log.md).
    """
    encoder.text_projection.weight *= norm / encoder(ids).text_embeds.norm(dim=-1).mean()  # type: ignore[union-attr]  # optional in transformers


def _fields(logits: Tensor, targets: Tensor, data: TeacherData) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [B, L, classes], target [B, L]) of each field, from `targets` [B, L, fields]."""
    start = 0
    for column, size in enumerate(data.field_sizes):
        yield logits[..., start : start + size], targets[..., column]
        start += size
