"""Prompt pools: encoded once, so that no text encoder is in memory while a transformer trains."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashgen.artifact.files import locked, read_state, remove_temporaries, write_state
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.errors import ArtifactError, UsageError
from flashgen.families.base import Family
from flashgen.families.conditioning import Conditioning
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import BATCH, encode_prompts
from flashgen.progress import say, track, warn
from flashgen.runtime.processes import from_first, rank, wait_for_all, world_size
from flashgen.training.mapped import is_whole, map_tensor, mark_written, read_mark, release
from flashgen.training.ranks import Draws

if TYPE_CHECKING:
    from flashgen.worlds.base import World

CPU = torch.device("cpu")
PROMPT_STREAM = 0x7EA1  # other prompts than those on which anything is judged


@dataclass(frozen=True)
class Texts:
    """Prompts, and the pipeline whose text encoders encode them when they are asked for."""

    prompts: list[str]
    pipe: Pipeline
    sampler: Sampler

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        """Conditioning of the prompts at `rows`."""
        chosen = self.prompts[rows] if isinstance(rows, slice) else [self.prompts[row] for row in rows.tolist()]
        return encode_prompts(self.pipe, chosen, self.sampler).to(CPU)


@dataclass(frozen=True)
class PromptPool:
    """Prompts as conditioning: `cond` is a table of distinct prompts, `empty` that of the empty prompt (one row).

    `index` [N] is the row of each prompt in the table; None: N rows in their order. `dropped`, bool [N] or None, says whose droppable text
    encoder is dropped. The tensors of `cond` may lie on the CPU, mapped from files by `mappings`: `pool[rows]` reads those rows alone; what
    the pool returns is on `device`. `key` names the contents; "" where nobody named them. With `texts` there is no table of prompts: `cond`
    is the empty prompt alone, and `index` points into `texts`, which are encoded as they are drawn.
    """

    cond: Conditioning
    empty: Conditioning
    dropped: Tensor | None = None
    index: Tensor | None = None
    device: torch.device = CPU
    mappings: tuple[mmap.mmap, ...] = ()
    key: str = ""
    texts: Texts | None = None

    @property
    def family(self) -> Family:
        """Model family of the conditioning."""
        return self.cond.family

    def __len__(self) -> int:
        return len(self.cond) if self.index is None else len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._gathered(rows)

    def _gathered(self, rows: Tensor | slice, also_dropped: Tensor | None = None) -> Conditioning:
        """The prompts at `rows` on `device`, those without the droppable text encoder that `dropped` or `also_dropped` (bool [B]) names."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        table = self.cond if self.texts is None else self.texts
        cond = table[rows if self.index is None else self.index[rows]]
        if self.dropped is not None:
            cond = _drop(cond, self.dropped[rows])
        if also_dropped is not None:
            cond = _drop(cond, also_dropped.cpu())
        placed = cond.map(self.placed)
        release(*self.mappings)
        return placed

    def placed(self, tensor: Tensor) -> Tensor:
        """`tensor`, which is on the CPU, on the pool's device; to a GPU through pinned memory, so that the copy waits for nothing.

        Pinned memory is not given out again before the copy is done. From ordinary memory MPS would read what is freed by then
        (pytorch 189690).
        """
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def on(self, device: torch.device) -> PromptPool:
        """The same prompts for networks on `device`."""
        return replace(self, device=device, empty=self.empty.to(device))

    def part(self, rows: slice) -> PromptPool:
        """The prompts at `rows`."""
        index = torch.arange(len(self.cond)) if self.index is None else self.index
        key = self.key and hash_json([self.key, rows.start, rows.stop, rows.step])
        return replace(self, index=index[rows], dropped=None if self.dropped is None else self.dropped[rows], key=key)

    def shared_out(self, count: int) -> list[PromptPool]:
        """`count` pools that take turns in the prompts."""
        return [self] if count == 1 else [self.part(slice(first, None, count)) for first in range(count)]

    def dropping(self, share: float, generator: torch.Generator) -> PromptPool:
        """The same prompts, a random `share` of them permanently without the family's droppable text encoder."""
        drawn = torch.rand(len(self), generator=generator) < share
        return replace(self, dropped=drawn if self.dropped is None else drawn | self.dropped)

    def draw(self, encoder_drop: float, draws: Draws) -> Conditioning:
        """Random prompts, each without the family's droppable text encoder with probability `encoder_drop`."""
        rows = draws.randint(len(self))
        return self._gathered(rows, draws.rand() < encoder_drop)

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


def training_prompts(
    world: World | None, own: Sequence[str] | None, count: int, seed: int, weights: Sequence[float] | None = None
) -> list[str]:
    """`count` training prompts: of `own` in random order, each equally often, or else random ones of `world`; a function of `seed`.

    With `weights` each prompt of `own` is drawn in proportion to its weight, with replacement. Raises UsageError without any prompts.
    """
    rng = np.random.default_rng([seed, PROMPT_STREAM])
    if own is not None and weights is not None:
        share = np.asarray(weights, dtype=np.float64)
        return [own[i] for i in rng.choice(len(own), count, p=share / share.sum())]
    if own is not None:
        order = np.concatenate([rng.permutation(len(own)) for _ in range(-(-count // len(own)))])
        return [own[i] for i in order[:count]]
    if world is None:
        raise UsageError("there are no prompts to train on: the artifact has no world; --set prompts_file=FILE, one prompt per line")
    return world.training_prompts(rng, count)


def prompt_pool(prompts: list[str], pipe: Pipeline, sampler: Sampler, store: Path | None = None, device: torch.device = CPU) -> PromptPool:
    """Conditioning of `prompts` and of the empty prompt, for networks on `device`.

    With `store`, a folder for the embeddings of these text encoders and this sampler, prompts that the folder has are not encoded again,
    the others are added, and all are mapped from there.
    """
    texts = [*prompts, ""]
    if store is None:
        cond = encode_prompts(pipe, texts, sampler).to(CPU)
        return PromptPool(cond[slice(len(prompts))], cond[slice(len(prompts), None)]).on(device)
    with ExitStack() as lock:
        from_first(lambda: _open(store, lock))
        table, rows, mappings = _stored(texts, pipe, sampler, store)
    index = torch.tensor([rows[_digest(text)] for text in texts])
    pool = PromptPool(table, table[index[-1:]], index=index[:-1], mappings=mappings, key=hash_json([store.name, prompts]))
    return pool.on(device)


def drawn_pool(prompts: list[str], pipe: Pipeline, sampler: Sampler, name: str, device: torch.device = CPU) -> PromptPool:
    """Like `prompt_pool`, without embeddings on the disk or in memory: `pipe` encodes prompts as they are drawn.

    `name` says which text encoders and which sampler these are, as the name of a store does.
    """
    empty, index = encode_prompts(pipe, [""], sampler), torch.arange(len(prompts))
    return PromptPool(empty, empty, index=index, key=hash_json([name, prompts]), texts=Texts(prompts, pipe, sampler)).on(device)


def _stored(texts: list[str], pipe: Pipeline, sampler: Sampler, store: Path) -> tuple[Conditioning, dict[str, int], tuple[mmap.mmap, ...]]:
    """(table of all prompts in `store`, row of each prompt by its digest, mappings) after adding `texts`, shared out over the processes.

    One file per tensor; a mark per batch, whose name is the batch's first row, lists the digests of its prompts. A batch that another
    process has not finished leaves rows that nothing names.
    """
    layout = from_first(lambda: _layout(pipe, sampler, store / "layout.state"))
    rows, first_free = from_first(lambda: _rows_in(store, layout, {_digest(text) for text in texts}))
    missing = [text for text in dict.fromkeys(texts) if _digest(text) not in rows]
    if reused := len(set(texts)) - len(missing):
        say(f"prompts: {reused} of {len(set(texts))} embeddings are reused from {store}")
    added = {_digest(text): row for row, text in enumerate(missing, first_free)}
    from_first(lambda: _mapped(store, layout, first_free + len(missing)) and None)  # one process makes the files longer
    tensors, mappings = _mapped(store, layout, first_free + len(missing))
    shares = {
        encoder: {key: tuple(slice(*part) for part in index) for key, index in parts.items()} for encoder, parts in layout["shares"].items()
    }
    table = Conditioning(pipe.family, tensors, shares)
    of_this_rank = range(0, len(missing), BATCH)[rank() :: world_size()]
    for start in track(of_this_rank, "embed prompts", total=len(of_this_rank)):
        batch, first = missing[start : start + BATCH], first_free + start
        for key, value in encode_prompts(pipe, batch, sampler).tensors.items():
            tensors[key][first : first + len(batch)] = value.cpu()
        digests = [_digest(text) for text in batch]
        mark_written(store / f"{first:08d}.done", digests, slice(first, first + len(batch)), tensors.values(), mappings)
    wait_for_all()
    return table, rows | added, mappings


def _open(store: Path, lock: ExitStack) -> None:
    store.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(store))
    remove_temporaries(store)


def _mapped(store: Path, layout: Mapping[str, Any], count: int) -> tuple[dict[str, Tensor], tuple[mmap.mmap, ...]]:
    """(tensors of `count` prompts by name, their mappings)."""
    pairs = {
        key: map_tensor(store / f"{key}.bin", getattr(torch, dtype), (count, *shape)) for key, (dtype, shape) in layout["tensors"].items()
    }
    return {key: tensor for key, (tensor, _) in pairs.items()}, tuple(memory for _, memory in pairs.values())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows_in(store: Path, layout: Mapping[str, Any], wanted: set[str]) -> tuple[dict[str, int], int]:
    """(row of each prompt of `wanted` that `store` has, by its digest; first row behind all marks). Marks of damaged rows are removed."""
    marks = {mark: read_mark(mark) or ("", []) for mark in sorted(store.glob("[0-9]*.done"))}
    parts = {mark: slice(int(mark.stem), int(mark.stem) + len(digests)) for mark, (_, digests) in marks.items()}
    count = max((part.stop for part in parts.values()), default=0)
    tensors, mappings = _mapped(store, layout, count) if count else ({}, ())
    rows, damaged = dict[str, int](), list[Path]()
    for mark, (digest, digests) in marks.items():
        if digest and wanted.isdisjoint(digests):
            continue  # rows that are not read
        if is_whole(digest, parts[mark], tensors.values(), mappings):
            rows |= {digest: row for row, digest in enumerate(digests, parts[mark].start)}
        else:
            damaged.append(mark)
            mark.unlink()
    if damaged:
        warn(f"{store}: {len(damaged)} of {len(marks)} parts are damaged and computed again")
    return rows, max((part.stop for mark, part in parts.items() if mark not in damaged), default=0)


def _layout(pipe: Pipeline, sampler: Sampler, file: Path) -> dict[str, Any]:
    """Dtype and shape of every tensor behind the batch axis, and the shares, as plain data; read from `file` where it exists.

    Floating-point tensors are bf16 where an encoder computes in it, else fp32; others (masks) keep their dtype.
    """
    try:
        if (saved := read_state(file)) is not None:
            return dict(json.loads(saved))
    except ArtifactError as error:
        warn(f"{error}; it is made again")
    floats = "bfloat16" if pipe.encodes_in_bf16() else "float32"
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
    write_state(file, json.dumps(layout).encode())
    return layout
