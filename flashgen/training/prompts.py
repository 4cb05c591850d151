"""Prompt pools: encoded once, so that no text encoder is in memory while a transformer trains."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.errors import UsageError
from flashgen.families.base import Family
from flashgen.families.conditioning import Conditioning
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import BATCH, encode_prompts
from flashgen.progress import track, warn
from flashgen.runtime.processes import from_first, rank, wait_for_all, world_size
from flashgen.training.ranks import CPU, Draws

if TYPE_CHECKING:
    from flashgen.worlds.base import World

PROMPT_STREAM = 0x7EA1  # other prompts than those on which anything is judged


@dataclass(frozen=True)
class PromptPool:
    """`cond` of N prompts, `empty` of the empty prompt (one row), and rows whose droppable text encoder is dropped, bool [N] or None.

    The tensors of `cond` may be mapped from files: `pool[rows]` reads those rows alone.
    """

    cond: Conditioning
    empty: Conditioning
    dropped: Tensor | None = None
    device: torch.device = CPU

    @property
    def family(self) -> Family:
        """Model family of the conditioning."""
        return self.cond.family

    def __len__(self) -> int:
        return len(self.cond)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        rows = rows if isinstance(rows, slice) else rows.cpu()
        cond = self.cond[rows].to(self.device)
        return cond if self.dropped is None else _drop(cond, self.dropped[rows].to(self.device))

    def first(self, count: int) -> PromptPool:
        """The first `count` prompts."""
        return replace(self, cond=self.cond[slice(count)], dropped=None if self.dropped is None else self.dropped[:count])

    def dropping(self, share: float, generator: torch.Generator) -> PromptPool:
        """The same prompts, a random `share` of them permanently without the family's droppable text encoder."""
        drawn = torch.rand(len(self), generator=generator) < share
        return replace(self, dropped=drawn if self.dropped is None else drawn | self.dropped)

    def draw(self, encoder_drop: float, draws: Draws) -> Conditioning:
        """Random prompts, each without the family's droppable text encoder with probability `encoder_drop`."""
        rows = draws.randint(len(self))
        return _drop(self[rows], draws.rand() < encoder_drop)

    def empty_for(self, cond: Conditioning) -> Conditioning:
        """The empty prompt for each row of `cond`; dropped where the row is, as a pipeline without that encoder guides itself."""
        empty, encoder = self.empty.expand(len(cond)), self.family.droppable
        return empty if encoder is None else empty.drop(encoder, ~cond.has(encoder))


def _drop(cond: Conditioning, rows: Tensor) -> Conditioning:
    """`cond` without the family's droppable text encoder at `rows` (bool [B])."""
    if cond.family.droppable is not None:
        return cond.drop(cond.family.droppable, rows)
    if rows.any():
        _warn_no_effect(cond.family.models)
    return cond


@cache
def _warn_no_effect(models: str) -> None:
    warn(f"encoder_drop has no effect: {models} have no text encoder that can be dropped; --set distill.encoder_drop=0")


def training_prompts(world: World | None, own: Sequence[str] | None, count: int, seed: int) -> list[str]:
    """`count` training prompts: of `own` in random order, each equally often, or else random ones of `world`; a function of `seed`.

    Raises UsageError without either.
    """
    rng = np.random.default_rng([seed, PROMPT_STREAM])
    if own is not None:
        order = np.concatenate([rng.permutation(len(own)) for _ in range(-(-count // len(own)))])
        return [own[i] for i in order[:count]]
    if world is None:
        raise UsageError("there are no prompts to train on: the artifact has no world; --set prompts_file=FILE, one prompt per line")
    return world.training_prompts(rng, count)


def prompt_pool(prompts: list[str], pipe: Pipeline, sampler: Sampler, work: Path | None = None, name: str = "") -> PromptPool:
    """Conditioning of `prompts` and of the empty prompt; with `work` it is kept in work/prompts-`name` and mapped from there."""
    texts = [*prompts, ""]
    cond = encode_prompts(pipe, texts, sampler) if work is None else _mapped(texts, pipe, sampler, work / f"prompts-{name}")
    empty = cond[slice(len(prompts), None)].to(pipe.device)
    return PromptPool(cond[slice(len(prompts))].to(CPU), empty, device=pipe.device)


def _mapped(texts: list[str], pipe: Pipeline, sampler: Sampler, folder: Path) -> Conditioning:
    """`encode_prompts` as one mapped file per tensor, shared out over the processes; a resumed run encodes the missing parts."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = from_first(lambda: _layout(pipe, sampler, folder / "layout.json"))
    tensors = {}
    for key, (dtype, shape) in layout["tensors"].items():
        full = torch.Size([len(texts), *shape])
        flat = torch.from_file(str(folder / f"{key}.bin"), shared=True, size=full.numel(), dtype=getattr(torch, dtype))
        tensors[key] = flat.reshape(full)
    shares = {
        encoder: {key: tuple(slice(*part) for part in index) for key, index in parts.items()} for encoder, parts in layout["shares"].items()
    }
    cond = Conditioning(pipe.family, tensors, shares)
    first_rows = range(0, len(texts), BATCH)[rank() :: world_size()]
    missing = [first for first in first_rows if not (folder / f"{first:06d}.done").exists()]
    for first in track(missing, "embed prompts", total=len(missing)):
        rows = slice(first, first + BATCH)
        for key, value in encode_prompts(pipe, texts[rows], sampler).tensors.items():
            cond.tensors[key][rows] = value.cpu()
        (folder / f"{first:06d}.done").touch()
    wait_for_all()
    return cond


def _layout(pipe: Pipeline, sampler: Sampler, file: Path) -> dict[str, Any]:
    """Dtype and shape of every tensor behind the batch axis, and the shares, as plain data; read from `file` where it exists.

    Floating-point tensors are bf16 where an encoder computes in it, else fp32; others (masks) keep their dtype.
    """
    if not file.exists():
        floats = "bfloat16" if pipe.streams_encoders() else "float32"
        cond = encode_prompts(pipe, [""], sampler)
        layout = {
            "tensors": {
                key: [floats if value.is_floating_point() else str(value.dtype).removeprefix("torch."), list(value.shape[1:])]
                for key, value in cond.tensors.items()
            },
            "shares": {
                encoder: {key: [[part.start, part.stop, part.step] for part in index] for key, index in parts.items()}
                for encoder, parts in cond.shares.items()
            },
        }
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(layout))
        os.replace(temporary, file)
    return dict(json.loads(file.read_text()))
