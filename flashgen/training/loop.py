"""The one training loop: resumable, stops at non-finite numbers, randomness a function of (seed, step)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flashgen.artifact.draft import CHECKPOINTS
from flashgen.errors import NumericsError
from flashgen.progress import say, track
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import rank, wait_for_all, world_size
from flashgen.training.checkpoint import Checkpoint, Stateful, truncate_stats
from flashgen.training.ranks import average_, summarise, summarise_ranks

DEFAULT = CheckpointRecipe()
Metric = float | Tensor  # a tensor holds one number and is read when metrics are logged


def fit(
    name: str,
    steps: int,
    step_fn: Callable[[int], Mapping[str, Metric]],
    state: Mapping[str, Stateful],
    work: Path,
    checkpoint: CheckpointRecipe = DEFAULT,
    *,
    log_every: int = 10,
) -> None:
    """Call `step_fn(step)` for every step in 0..steps-1 that no earlier run has finished.

    `state` names everything that must survive (modules, optimizers, averages); it is saved to `work/checkpoints/<name>/` as often as
    `checkpoint` allows and at the end. Metrics are averaged over `log_every` steps, or their minimum is taken where they are named `*_min`.
    They go to `work/stats.jsonl`, to a table on the terminal, and to TensorBoard where that is installed.
    """
    work.mkdir(parents=True, exist_ok=True)
    with closing(Checkpoint(work / CHECKPOINTS / name, state, checkpoint)) as saved:
        start, loaded = saved.load()
        window: list[dict[str, Metric]] = [dict(row) for row in loaded]
        log = _Log(work, name, start)
        if world_size() > 1:
            say(f"{name}: each batch shared out over {world_size()} processes")
        for step in track(range(start, steps), name, total=steps, done=start, rows=log.rows):
            window.append(dict(step_fn(step)))
            is_last, is_due = step + 1 == steps, saved.due()
            is_logged = is_last or (step + 1) % log_every == 0
            if is_logged or is_due:
                rows = [{key: float(value) for key, value in row.items()} for row in window]  # waits for an accelerator
                for row in rows:
                    check_finite(f"{name} up to step {step}", row, "the next checkpoint")
            if is_logged:
                log.add(step + 1, summarise_ranks(summarise(rows)))
                window.clear()
            if is_last or is_due:
                saved.save(step + 1, [] if is_logged else [summarise_ranks(row) for row in rows])
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
    losses: Iterable[Tensor], parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer], *, clip: float, where: str
) -> tuple[Tensor, Tensor]:
    """Backward passes, clipping to norm `clip`, and one step of each optimizer; returns (loss, norm before clipping) as numbers [].

    `losses` are those of micro-batches, each already weighted by its share of this process's rows; a backward pass frees one before the
    next is computed. No gradient is left behind. On the CPU a loss or norm that is not finite raises NumericsError before any weight
    changes; on an accelerator, which would have to wait for it, `fit` does so before it logs or saves.
    """
    optimizers, parameters = list(optimizers), list(parameters)
    total: Tensor | None = None
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach().clone() if total is None else total + loss.detach()
    assert total is not None
    average_([total, *(p.grad for p in parameters if p.grad is not None)])
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if norm.device.type == "cpu":
        check_finite(where, {"loss": total.item(), "grad_norm": norm.item()}, "the optimizer step")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def check_finite(where: str, metrics: Mapping[str, float], before: str) -> None:
    """Raises NumericsError if a metric is infinite or not a number; `before` says what has not happened yet."""
    if broken := {key: value for key, value in metrics.items() if not math.isfinite(value)}:
        words = ", ".join(f"{key} {value:.4g}" for key, value in broken.items())
        raise NumericsError(f"{where}: {words}; stopped before {before}. Lower the learning rate with --set ...lr=")
