"""The one training loop: resumable, stops at non-finite numbers, randomness a function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from flashgen.artifact.draft import CHECKPOINTS
from flashgen.errors import NumericsError
from flashgen.progress import say, track
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import wait_for_all, world_size
from flashgen.training.checkpoint import Checkpoint, Stateful
from flashgen.training.log import RATE, Log
from flashgen.training.ranks import average_, summarise, summarise_ranks
from flashgen.training.shards import full

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
    log_every: int | None = None,
) -> None:
    """Call `step_fn(step)` for every step in 0..steps-1 that no earlier run has finished.

    `state` names everything that must survive (modules, optimizers, averages); it is saved to `work/checkpoints/<name>/` as often as
    `checkpoint` allows and at the end. Metrics are averaged over `log_every` steps (None: the recipe's `log.every`), or their minimum is
    taken where they are named `*_min`. With the learning rates of the optimizers in `state` they go to `work/stats.jsonl`, to a table on
    the terminal, and to trackers, which get the validations' pictures too (`training.log`).
    """
    work.mkdir(parents=True, exist_ok=True)
    with closing(Checkpoint(work / CHECKPOINTS / name, state, checkpoint)) as saved:
        start, loaded = saved.load()
        window: list[dict[str, Metric]] = [dict(row) for row in loaded]
        log = Log(work, name, start, steps)
        every = log_every or log.logging.recipe.every
        if world_size() > 1:
            say(f"{name}: each batch shared out over {world_size()} processes")
        for step in track(range(start, steps), name, total=steps, done=start, rows=log.rows):
            window.append(dict(step_fn(step)))
            is_last, is_due = step + 1 == steps, saved.due()
            is_logged = is_last or (step + 1) % every == 0
            log.add_picture(step + 1)
            if is_logged or is_due:
                rows = [{key: float(value) for key, value in row.items()} for row in window]  # waits for an accelerator
                for row in rows:
                    check_finite(f"{name} up to step {step}", row, "the next checkpoint")
            if is_logged:
                log.add(step + 1, summarise_ranks(summarise(rows)) | learning_rates(state))
                window.clear()
            if is_last or is_due:
                saved.save(step + 1, [] if is_logged else [summarise_ranks(row) for row in rows])
                log.saving_s += saved.blocked_s
        log.close()
    wait_for_all()


def learning_rates(state: Mapping[str, Stateful]) -> dict[str, float]:
    """Learning rate of the first parameters of every optimizer in `state`, by `lr_` and its name."""
    return {f"{RATE}{name}": float(item.param_groups[0]["lr"]) for name, item in state.items() if isinstance(item, Optimizer)}


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
    norm = full(nn.utils.clip_grad_norm_(parameters, clip))
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
