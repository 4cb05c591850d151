"""The one training loop: resumable, guarded against non-finite numbers, randomness a function of (seed, step)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from flashgen.errors import NumericsError
from flashgen.processes import rank, wait_for_all, world
from flashgen.progress import say, track
from flashgen.training.ranks import average_, first_says, summary, summary_of_all
from flashgen.training.shards import cut, load, whole


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def fit(
    name: str,
    steps: int,
    step_fn: Callable[[int], dict[str, float]],
    state: Mapping[str, Stateful],
    work: Path,
    *,
    save_every_s: float = 60.0,
    log_every: int = 10,
) -> None:
    """Call `step_fn(step)` for every step in 0..steps-1 that no earlier run has finished.

    `state` names everything that must survive (modules, optimizers, EMA); it is saved to `work/<name>.pt` in
    time intervals and at the end. Metrics go to `work/stats.jsonl`, averaged over `log_every` steps (of those named `*_min` the least),
    to a table on the terminal, and to TensorBoard where that is installed.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.pt"
    start = 0
    window: list[dict[str, float]] = []
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location="cpu")
        for key, item in state.items():
            load(item, saved["state"][key])
        start, window = int(saved["step"]), saved.get("window", []) if rank() == 0 else []  # it is the first process's own
    wait_for_all()  # all have read the same state
    if rank() == 0:
        _truncate_stats(work / "stats.jsonl", name, start)
    if world() > 1:
        say(f"{name}: each batch shared out over {world()} processes")
    last_save = time.monotonic()
    shown: list[dict[str, float]] = []
    board = _board(work / "tensorboard" / name, start) if rank() == 0 else None
    for step in track(range(start, steps), name, total=steps, done=start, rows=shown):
        window.append({k: float(v) for k, v in step_fn(step).items()})
        if (step + 1) % log_every == 0 or step + 1 == steps:
            means = summary_of_all(summary(window))
            if rank() == 0:
                with (work / "stats.jsonl").open("a") as stats:
                    stats.write(json.dumps({"phase": name, "step": step + 1, "time": round(time.time(), 1), **means}) + "\n")
                shown.append({"step": step + 1, **means})
                if board:
                    for key, value in means.items():
                        board.add_scalar(f"{name}/{key}", value, step + 1)
            window.clear()
        if step + 1 == steps or first_says(time.monotonic() - last_save > save_every_s):
            found = {k: whole(v.state_dict(), keep=rank() == 0) for k, v in state.items()}
            if rank() == 0:
                save_state({"step": step + 1, "window": window, "state": found}, path)
            last_save = time.monotonic()
    wait_for_all()


Watch = Callable[[str, torch.nn.Module], float | None]  # sees a network under a name; its score, where it is judged


def look(watch: Watch | None, name: str, step: int, steps: int, every: int, ema: Ema, network: torch.nn.Module) -> dict[str, float]:
    """Show `watch` the averaged weights of `network` behind every `every` steps and the last (0: never); the score, if there is one."""
    if watch is None or not every or ((step + 1) % every and step + 1 < steps):
        return {}
    with ema.shown_by(network):
        score = watch(f"{name}-{step + 1:06d}", network)
    return {} if score is None else {"composition": score}


def _board(folder: Path, start: int) -> Any:
    """A TensorBoard writer for `tensorboard --logdir .../.work`, where that is installed; what it has beyond `start` is written again."""
    try:
        tensorboard = import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return tensorboard.SummaryWriter(folder, purge_step=start + 1)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a torch file so that a kill at any moment leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _truncate_stats(path: Path, name: str, step: int) -> None:
    """Forget rows that the resumed run will write again."""
    if path.exists():
        rows = [row for row in path.read_text().splitlines() if _keep(row, name, step)]
        path.write_text("".join(row + "\n" for row in rows))


def _keep(row: str, name: str, step: int) -> bool:
    try:
        data = json.loads(row)
    except json.JSONDecodeError:
        return False  # the line a kill cut short
    return bool(data["phase"] != name or data["step"] <= step)


def descend(
    loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter], optimizers: Iterable[torch.optim.Optimizer], *, clip: float, where: str
) -> float:
    """Backward, check, clip and step. Raises NumericsError before any weight changes when something is not finite."""
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


class Ema:
    """Exponential moving average of a module's parameters (buffers are shared, not averaged)."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: p.detach().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """shadow <- d shadow + (1-d) weights, d = min(decay, (1+step)/(10+step)) so that early steps count."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    def copy_to(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(self.shadow[key])

    @contextmanager
    def shown_by(self, module: torch.nn.Module) -> Iterator[None]:
        """`module` has the averaged weights inside, its own again afterwards."""
        own = [p.detach().clone() for p in module.parameters()]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(module.parameters(), own, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state["shadow"].items():
            self.shadow[key].copy_(cut(value, self.shadow[key]))


class Best:
    """The averaged weights with the highest score so far; the earlier ones win a tie."""

    def __init__(self) -> None:
        self.score, self.step, self.shadow = -math.inf, 0, dict[str, torch.Tensor]()
        self.last = -math.inf

    def offer(self, score: float, step: int, ema: Ema) -> None:
        self.last = score
        if score > self.score:
            self.score, self.step = score, step
            self.shadow = {k: v.clone() for k, v in ema.shadow.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step, "shadow": self.shadow, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step, self.shadow, self.last = state["score"], state["step"], state["shadow"], state["last"]
