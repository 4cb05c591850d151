"""Pretraining the shapes world's text encoders on captions alone; flow training then leaves them frozen, as SD3 does.

The T5-type encoder learns grammar: every one of its tokens must tell which shape has which colour, count, place and background.
The CLIP-type ones learn what words are there, not what belongs to what: a bag of words, as contrastive training makes of CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from flashgen.models.text import tokenize
from flashgen.models.tokenizers import WORDS
from flashgen.recipe.schema import EncoderTraining
from flashgen.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Request, sample_request
from flashgen.training.loop import descend, fit
from flashgen.training.schedule import cosine

ENCODER_STREAM = 4
FIELDS: tuple[tuple[str | int | None, ...], ...] = (
    SHAPES,
    (None, *COLORS),
    (1, 2, 3, 4),
    (None, *SHAPES),
    (None, *COLORS),
    (None, *RELATIONS),
    (None, *BACKGROUNDS),
)


def meaning(request: Request) -> list[int]:
    """What a caption says, as one class index a field of `FIELDS`: first group, second group, relation, background."""
    first, second = request.groups[0], request.groups[1] if len(request.groups) > 1 else None
    said = (
        first.shape,
        first.color,
        first.count,
        second.shape if second else None,
        second.color if second else None,
        request.relation,
        request.background,
    )
    return [values.index(value) for values, value in zip(FIELDS, said, strict=True)]


def train_encoders(pipe: StableDiffusion3Pipeline, config: EncoderTraining, t5_tokens: int, seed: int, work: Path) -> None:
    """Gradient: the three encoders (not CLIP's position tables) and linear heads that are thrown away."""
    torch.manual_seed(seed)
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    heads = nn.ModuleDict({"text_encoder_3": nn.Linear(pipe.text_encoder_3.config.d_model, sum(map(len, FIELDS)))})
    for name in ("text_encoder", "text_encoder_2"):
        heads[name] = nn.Linear(encoders[name].config.projection_dim, len(WORDS))
    module = nn.ModuleDict({**encoders, "heads": heads})
    parameters = [p for n, p in module.named_parameters() if "position_embedding" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step_fn(step: int) -> dict[str, float]:
        rng = np.random.default_rng([seed, ENCODER_STREAM, step])
        requests = [sample_request(rng) for _ in range(config.batch)]
        captions = [r.caption() for r in requests]
        tokens = tokenize(pipe, captions, t5_tokens)
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.lr, step, config.steps, warmup=50)
        targets = torch.tensor([meaning(r) for r in requests])
        logits = heads["text_encoder_3"](pipe.text_encoder_3(tokens.t5)[0])
        grammar = torch.stack([cross_entropy(part.transpose(1, 2), want) for part, want in _fields(logits, targets)]).mean()
        present = torch.tensor([[float(word in caption.split()) for word in WORDS] for caption in captions])
        pooled = {"text_encoder": tokens.clip_l, "text_encoder_2": tokens.clip_g}
        words = [binary_cross_entropy_with_logits(heads[n](encoders[n](ids).text_embeds), present) for n, ids in pooled.items()]
        loss = grammar + sum(words)
        norm = descend(loss, parameters, [optimizer], clip=1.0, where=f"encoder step {step}")
        return {"loss": loss.item(), "grammar": grammar.item(), "words": sum(w.item() for w in words), "grad_norm": norm}

    fit("encoders", config.steps, step_fn, {"module": module, "optimizer": optimizer}, work)
    for encoder in encoders.values():
        encoder.requires_grad_(False)


def _fields(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [B, L, classes], target [B, L]) of each field: every token is asked everything."""
    start = 0
    for column, values in enumerate(FIELDS):
        want = targets[:, column, None].expand(-1, logits.shape[1])
        yield logits[..., start : start + len(values)], want
        start += len(values)
