"""The one training loop: resumable, stops at non-finite numbers, randomness a function of (seed, step)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from flashgen.errors import NumericsError
from flashgen.progress import say, track
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import rank, wait_for_all, world_size
from flashgen.training.checkpoint import Checkpoint, Stateful, truncate_stats
from flashgen.training.ranks import average_, summarise, summarise_ranks

DEFAULT = CheckpointRecipe()


def fit(
    name: str,
    steps: int,
    step_fn: Callable[[int], dict[str, float]],
    state: Mapping[str, Stateful],
    work: Path,
    checkpoint: CheckpointRecipe = DEFAULT,
    *,
    log_every: int = 10,
) -> None:
    """Call `step_fn(step)` for every step in 0..steps-1 that no earlier run has finished.

    `state` names everything that must survive (modules, optimizers, averages); it is saved to `work/<name>.pt` as often as `checkpoint`
    allows and at the end. Metrics are averaged over `log_every` steps, or their minimum is taken where they are named `*_min`. They go to
    `work/stats.jsonl`, to a table on the terminal, and to TensorBoard where that is installed.
    """
    work.mkdir(parents=True, exist_ok=True)
    saved = Checkpoint(work / f"{name}.pt", state, checkpoint)
    start, window = saved.load()
    log = _Log(work, name, start)
    if world_size() > 1:
        say(f"{name}: each batch shared out over {world_size()} processes")
    for step in track(range(start, steps), name, total=steps, done=start, rows=log.rows):
        window.append({key: float(value) for key, value in step_fn(step).items()})
        is_last = step + 1 == steps
        if (step + 1) % log_every == 0 or is_last:
            log.add(step + 1, summarise_ranks(summarise(window)))
            window.clear()
        if is_last or saved.due():
            saved.save(step + 1, window)
    wait_for_all()


class _Log:
    """Metrics of one training from step `start` on; rank 0 alone writes. `rows` are those of this run."""

    def __init__(self, work: Path, name: str, start: int) -> None:
        self.name, self.path, self.rows = name, work / "stats.jsonl", list[dict[str, float]]()
        self.board: Any = None
        if rank() == 0:
            truncate_stats(self.path, name, start)
            try:  # view it with: tensorboard --logdir .../.work
                writer = import_module("torch.utils.tensorboard").SummaryWriter
                self.board = writer(work / "tensorboard" / name, purge_step=start + 1)
            except ImportError:
                pass

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row, of the steps up to `step`."""
        if rank() != 0:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"phase": self.name, "step": step, "time": round(time.time(), 1), **metrics}) + "\n")
        self.rows.append({"step": step, **metrics})
        if self.board:
            for key, value in metrics.items():
                self.board.add_scalar(f"{self.name}/{key}", value, step)


def descend(
    loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter], optimizers: Iterable[torch.optim.Optimizer], *, clip: float, where: str
) -> float:
    """Backward pass, check, clipping to norm `clip`, and one step of each optimizer; returns the norm before clipping.

    Raises NumericsError before any weight changes when the loss or the norm is not finite.
    """
    optimizers, parameters = list(optimizers), list(parameters)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    mean = loss.detach().clone()
    average_([mean, *(p.grad for p in parameters if p.grad is not None)])
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    if not (math.isfinite(norm) and math.isfinite(mean.item())):
        raise NumericsError(
            f"{where}: loss {mean.item():.4g}, gradient norm {norm:.4g}; stopped before the optimizer step. "
            "Lower the learning rate with --set ...lr="
        )
    for optimizer in optimizers:
        optimizer.step()
    return norm
