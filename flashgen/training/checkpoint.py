"""Resume state of a training: what is saved, how often, and how it gets to the disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flashgen.artifact.files import fsync
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import rank, wait_for_all
from flashgen.training.ranks import broadcast_flag
from flashgen.training.shards import gather, load_gathered


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]:
        """State as plain values, tensors and dicts of them."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore what `state_dict` returned."""


class Checkpoint:
    """The resume state of one training, in the file `path`: everything in `state`, the step, and metrics that are not logged yet."""

    def __init__(self, path: Path, state: Mapping[str, Stateful], recipe: CheckpointRecipe) -> None:
        self.path, self.state, self.recipe = path, state, recipe
        self.saved_at, self.saving_s = time.monotonic(), 0.0

    def load(self) -> tuple[int, list[dict[str, float]]]:
        """Restore `state`; returns (steps done, metrics not logged yet), (0, []) without a file. All processes must call it."""
        step, window = 0, list[dict[str, float]]()
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            for key, item in self.state.items():
                load_gathered(item, saved["state"][key])
            step, window = int(saved["step"]), saved["window"] if rank() == 0 else []  # other ranks' metrics are not saved
        wait_for_all()  # nobody overwrites the file while another process reads it
        return step, window

    def due(self) -> bool:
        """True when `every_s` seconds have passed and saving, as long as it took last time, stays within `share` of the time.

        Rank 0 decides; all processes must call it.
        """
        elapsed = time.monotonic() - self.saved_at
        return broadcast_flag(elapsed >= max(self.recipe.every_s, self.saving_s / self.recipe.share))

    def save(self, step: int, window: list[dict[str, float]]) -> None:
        """Save the state after `step` steps. All processes must call it; rank 0 writes."""
        start = time.monotonic()
        gathered = {key: gather(learned_state(item), keep=rank() == 0) for key, item in self.state.items()}
        if rank() == 0:
            save_state({"step": step, "window": window, "state": gathered}, self.path)
        self.saved_at = time.monotonic()
        self.saving_s = self.saved_at - start


def learned_state(item: Stateful) -> dict[str, Any]:
    """`item.state_dict()`; of a module without its buffers, position tables (900 MB of SD3.5-Medium) that nothing changes."""
    buffers = dict(item.named_buffers()) if isinstance(item, nn.Module) else {}
    return {key: value for key, value in item.state_dict().items() if key not in buffers}


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a torch file so that a kill or a power failure at any moment leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    _replace(temporary, path)


def truncate_stats(path: Path, phase: str, step: int) -> None:
    """Remove rows of `phase` behind `step`, which a resumed run writes again, and a line that a kill cut short."""
    if path.exists():
        rows = [row for row in path.read_text().splitlines() if _is_kept(row, phase, step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(row + "\n" for row in rows))
        _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    fsync(temporary)
    os.replace(temporary, path)


def _is_kept(row: str, phase: str, step: int) -> bool:
    try:
        data = json.loads(row)
    except json.JSONDecodeError:
        return False
    return bool(data["phase"] != phase or data["step"] <= step)
