"""Pretraining the shapes world's text encoders on captions alone; flow training then leaves them frozen, as SD3 does.

The three differ in what they know, as the real ones do. T5-type: the whole grammar. CLIP-G-type: a bag of phrases, so which
colour a shape has, but not what is left of what. CLIP-L-type: a bag of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import CLIPTextModelWithProjection

from flashgen.models.text import tokenize
from flashgen.models.tokenizers import WORDS
from flashgen.recipe.schema import EncoderTraining
from flashgen.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Relation, Request, prompt_set, sample_request
from flashgen.training.loop import descend, fit
from flashgen.training.schedule import cosine, set_rates

ENCODER_STREAM = 4
SHAPE, COLOR, COUNT = (None, *SHAPES), (None, *COLORS), (None, 1, 2, 3, 4)
FIELDS: tuple[tuple[str | int | None, ...], ...] = (SHAPE, COLOR, COUNT, (None, *RELATIONS), (None, *BACKGROUNDS))
PHRASES = tuple((shape, color) for shape in SHAPES for color in COLOR)
INVERSE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def meaning(request: Request, length: int) -> list[list[int]]:
    """What each of a caption's first `length` tokens says, as one class index a field of `FIELDS`; [length, fields].

    A word of a group tells its own group's shape, colour, count and place (the relation as seen from this group), so that
    image tokens bind by attending to one group's words. Every token tells the background.
    """
    places = (request.relation, INVERSE[request.relation]) if request.relation else (None, None)
    nothing: tuple[str | int | None, ...] = (None, None, None, None)
    said: list[tuple[str | int | None, ...]] = []
    for group, place in zip(request.groups, places, strict=False):
        if said:
            said += [nothing] * len((request.relation or "and").split())
        said += [(group.shape, group.color, group.count, place)] * len(group.words().split())
    said += [nothing] * (length - len(said))
    return [[values.index(value) for values, value in zip(FIELDS, (*fields, request.background), strict=True)] for fields in said[:length]]


def phrases(request: Request) -> list[float]:
    """Which (shape, colour) pairs a caption names, of `PHRASES`; in no order, without places."""
    named = {(group.shape, group.color) for group in request.groups}
    return [float(pair in named) for pair in PHRASES]


def train_encoders(pipe: StableDiffusion3Pipeline, config: EncoderTraining, t5_tokens: int, seed: int, work: Path) -> None:
    """Gradient: the three encoders (not CLIP's position tables) and linear heads that are thrown away."""
    torch.manual_seed(seed)
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    heads = nn.ModuleDict({"text_encoder_3": nn.Linear(pipe.text_encoder_3.config.d_model, sum(map(len, FIELDS)))})
    for name, known in (("text_encoder", len(WORDS)), ("text_encoder_2", len(WORDS) + len(PHRASES))):
        heads[name] = nn.Linear(encoders[name].config.projection_dim, known)
    module = nn.ModuleDict({**encoders, "heads": heads})
    parameters = [p for n, p in module.named_parameters() if "position_embedding" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step_fn(step: int) -> dict[str, float]:
        rng = np.random.default_rng([seed, ENCODER_STREAM, step])
        requests = [sample_request(rng) for _ in range(config.batch)]
        captions = [r.caption() for r in requests]
        tokens = tokenize(pipe, captions, t5_tokens)
        set_rates([optimizer], cosine(step, config.steps, warmup=50))
        targets = torch.tensor([meaning(r, t5_tokens) for r in requests])
        logits = heads["text_encoder_3"](pipe.text_encoder_3(tokens.t5)[0])
        grammar = torch.stack([cross_entropy(part.transpose(1, 2), want) for part, want in _fields(logits, targets)]).mean()
        present = torch.tensor([[float(word in caption.split()) for word in WORDS] for caption in captions])
        said = {"text_encoder": present, "text_encoder_2": torch.cat([present, torch.tensor([phrases(r) for r in requests])], 1)}
        pooled = {"text_encoder": tokens.clip_l, "text_encoder_2": tokens.clip_g}
        words = [binary_cross_entropy_with_logits(heads[n](encoders[n](ids).text_embeds), said[n]) for n, ids in pooled.items()]
        loss = grammar + sum(words)
        norm = descend(loss, parameters, [optimizer], clip=1.0, where=f"encoder step {step}")
        return {"loss": loss.item(), "grammar": grammar.item(), "words": sum(w.item() for w in words), "grad_norm": norm}

    fit("encoders", config.steps, step_fn, {"module": module, "optimizer": optimizer}, work)
    for encoder in encoders.values():
        encoder.requires_grad_(False)
    tokens = tokenize(pipe, [request.caption() for request in prompt_set(seed, 40)], t5_tokens)
    _soften(pipe.text_encoder, tokens.clip_l, config.pooled_norm)
    _soften(pipe.text_encoder_2, tokens.clip_g, config.pooled_norm)


@torch.no_grad()
def _soften(encoder: CLIPTextModelWithProjection, ids: Tensor, norm: float) -> None:
    """Scale the projection so that pooled vectors have `norm` on average.

    A loud pooled vector tells every image token the same through adaLN, long before attention has learned to tell tokens
    different things, and then a model knows which colours there are but not which shape has which (docs/lab-log.md).
    """
    encoder.text_projection.weight *= norm / encoder(ids).text_embeds.norm(dim=-1).mean()


def _fields(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [B, L, classes], target [B, L]) of each field, from `targets` [B, L, fields]."""
    start = 0
    for column, values in enumerate(FIELDS):
        yield logits[..., start : start + len(values)], targets[..., column]
        start += len(values)
