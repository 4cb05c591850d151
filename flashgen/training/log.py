"""The rows of a training: `stats.jsonl`, a table on the terminal, and Accelerate's trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch

from flashgen.artifact.draft import TENSORBOARD
from flashgen.artifact.files import write_whole
from flashgen.errors import MachineError
from flashgen.png import read_picture
from flashgen.recipe.schema import LogRecipe
from flashgen.runtime.machines import bf16_peak
from flashgen.runtime.processes import rank, world_size
from flashgen.training.checkpoint import truncate_stats

RATE = "lr_"  # prefix of the learning rates
FIRST = ("samples_s", "score", "loss", "matching", "fake_score_loss", "std", "grad_norm")  # columns of a narrow terminal


@dataclass(frozen=True)
class StepCost:
    """Samples of one step of a training, of all processes, and the multiply-adds of its networks (0: not known) from step `first` on."""

    samples: int
    multiply_adds: float = 0.0
    first: int = 0


@dataclass(frozen=True)
class Logging:
    """Settings of the logs of a stage's trainings: `run` names the run for trackers, `costs` is by training."""

    recipe: LogRecipe = field(default_factory=LogRecipe)
    run: str = "training"
    settings: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, StepCost] = field(default_factory=dict)


LOGGING: ContextVar[Logging] = ContextVar("LOGGING")  # of the stage that runs (`stages.tracking`)


class Log:
    """Rows of the training `name` from step `start` of `steps` on; rank 0 alone writes. `rows` are those of this run, for the terminal.

    Metrics are a function of recipe and seed. What depends on the machine is the entry `machine` of a row: samples per second and TFLOP
    per second (two operations per multiply-add) of all processes without the time of checkpoints, memory in GiB (the peak of a GPU, or
    what the process holds on a CPU), and the seconds of the checkpoints since the row before.
    """

    def __init__(self, work: Path, name: str, start: int, steps: int) -> None:
        self.logging, self.work, self.name, self.rows = LOGGING.get(Logging()), work, name, list[dict[str, float]]()
        self.step, self.since, self.saving_s = start, time.monotonic(), 0.0
        self.trackers = list[Any]()
        if rank() == 0:
            truncate_stats(work / "stats.jsonl", name, start)
            self.trackers = start_trackers(self.logging, work, name, start) if start < steps else []

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row, of the steps up to `step`."""
        machine = self._machine(step)
        self.step, self.since, self.saving_s = step, time.monotonic(), 0.0
        if rank() != 0:
            return
        row = {"phase": self.name, "step": step, "time": round(time.time(), 1), **metrics, "machine": machine}
        with (self.work / "stats.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that comes after this row must not outlive it
        values = {**metrics, **machine}
        shown = [*(key for key in FIRST if key in values), *(key for key in metrics if key not in FIRST and not key.startswith(RATE))]
        self.rows.append({"step": step} | {key: values[key] for key in shown})
        for tracker in self.trackers:
            tracker.log({f"{self.name}/{key}": value for key, value in values.items()}, step=step)

    def add_picture(self, step: int) -> None:
        """Give the trackers the sample grid that a validation has drawn after `step` steps, if there is one."""
        picture = self.work / "samples" / f"{self.name}-{step:06d}.png"
        if self.trackers and picture.exists():
            pixels = read_picture(picture)[None]
            for tracker in self.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"{self.name}/samples": pixels}, step=step, **layout)

    def close(self) -> None:
        """Let the trackers write what they still hold."""
        for tracker in self.trackers:
            tracker.finish()

    def _machine(self, step: int) -> dict[str, float]:
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        machine = {"memory_gib": round(memory / 2**30, 3), "checkpoint_s": round(self.saving_s, 6)}
        seconds, cost = time.monotonic() - self.since - self.saving_s, self.logging.costs.get(self.name)
        if cost is None or seconds <= 0:
            return machine
        rate = (step - self.step) / seconds
        operations = 2 * rate * cost.multiply_adds if self.step >= cost.first else 0.0
        speed = {"samples_s": rate * cost.samples} | ({"tflop_s": operations / 1e12} if operations else {})
        peak = bf16_peak(torch.cuda.get_device_name()) if on_gpu and operations else None
        return speed | ({"peak_share": operations / peak / world_size()} if peak else {}) | machine


def start_trackers(logging: Logging, work: Path, name: str, start: int) -> list[Any]:
    """Accelerate's trackers of the training `name`, resumed at step `start`; call it in one process, which alone may use them.

    TensorBoard drops rows behind `start` that an interrupted run has left. wandb ignores rows of steps that its run has already, which
    are the same as those that a resumed training gives. Raises MachineError when a tracker does not start.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names: Sequence[str] = logging.recipe.trackers or []
    if logging.recipe.trackers is None:
        names = [tracker for tracker in ("tensorboard",) if tracker in map(str, get_available_trackers())]
    if names and world_size() == 1 and not PartialState._shared_state:
        PartialState(cpu=True)  # Accelerate's loggers ask for a state; this one starts no process group
    trackers = []
    for tracker in names:
        options: dict[str, Any] = {"run_name": name, "logging_dir": work / TENSORBOARD, "purge_step": start + 1}
        if tracker == "wandb":
            options = {"run_name": logging.recipe.project, "name": f"{logging.run} {name}", "group": logging.run, "dir": str(work)}
            options |= {"id": _run_id(work / f"wandb-{name}.id"), "resume": "allow", "config": dict(logging.settings)}
        try:
            started = LOGGER_TYPE_TO_CLASS[tracker](**options)
            started.main_process_only = False  # only one process has trackers
            started.start()
        except Exception as error:
            mend = "log in with: wandb login, or leave it out with --set log.trackers=[]"
            raise MachineError(f"log.trackers: {tracker} does not start ({error}); {mend}") from error
        trackers.append(started)
    return trackers


def _run_id(file: Path) -> str:
    """The identity of a run in the service: the one in `file`, or a new one, written there."""
    if not file.exists():
        write_whole(file, uuid4().hex.encode())
    return file.read_text()
