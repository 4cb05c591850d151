"""Rows, rates and pictures of a training in Accelerate's trackers, and what a resumed training adds to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import nn

from flashgen.errors import MachineError
from flashgen.recipe.schema import CheckpointRecipe, LogRecipe
from flashgen.training.checkpoint import Checkpoint
from flashgen.training.log import LOGGING, Logging, StepCost
from flashgen.training.loop import Metric, descend, fit

EVERY_STEP = CheckpointRecipe.model_construct(every_s=0.0, share=1e9)


class Recorder(GeneralTracker):
    """A tracker of Accelerate that keeps what it is given."""

    name, requires_logging_directory = "wandb", False

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options, self.finished = run_name, options, False
        self.values, self.pictures = list[tuple[int, dict[str, float]]](), list[tuple[int, dict[str, Any]]]()

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert step is not None and not options
        self.values.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        assert step is not None and not options
        self.pictures.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def logged() -> Iterator[Callable[..., None]]:
    """`logged(trackers, ...)`: what a stage says before its trainings run."""
    token = LOGGING.set(Logging())

    def log(*trackers: str, **options: Any) -> None:
        LOGGING.set(Logging(LogRecipe.model_validate({"trackers": trackers, "every": 2, "project": "mine"}), "distill demo", **options))

    yield log
    LOGGING.reset(token)


def train(work: Path, steps: int, fail_at: int | None = None, checkpoint: CheckpointRecipe = EVERY_STEP) -> None:
    """A linear layer under AdamW whose rate falls; after step 3 a validation draws a grid."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step_fn(step: int) -> dict[str, Metric]:
        if step == fail_at:
            raise KeyboardInterrupt
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        loss, norm = descend([model(torch.ones(4, 3)).square().mean()], model.parameters(), [optimizer], clip=1.0, where="")
        if step == 2:
            (work / "samples").mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 16, 3), 7, np.uint8)).save(work / "samples" / "phase-000003.png")
        return {"loss": loss, "grad_norm": norm}

    fit("phase", steps, step_fn, {"model": model, "adamw": optimizer}, work, checkpoint)


def rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "stats.jsonl").read_text().splitlines()]


def test_trackers_get_metrics_rates_and_pictures_and_a_resumed_run_continues_them(
    logged: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Recorder] = []

    def make(**options: Any) -> Recorder:
        made.append(Recorder(**options))
        return made[-1]

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", make)
    monkeypatch.setattr(Checkpoint, "due", lambda self: self.wait() is None)  # every step is saved, however slow the disk is
    logged("wandb", costs={"phase": StepCost(64, 5e11, 2)}, settings={"steps": 4})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, fail_at=5)
    train(tmp_path, 6)
    first, second = made
    assert not first.finished and second.finished
    assert first.project == "mine" and first.options["resume"] == "allow" and first.options["config"] == {"steps": 4}
    assert first.options["id"] == second.options["id"]  # one run of the service
    assert [step for step, _ in first.values] == [2, 4] and [step for step, _ in second.values] == [6]
    assert [(step, value["phase/samples"].shape) for step, value in first.pictures] == [(3, (1, 8, 16, 3))] and not second.pictures
    for row, (step, values) in zip(rows(tmp_path), first.values + second.values, strict=True):
        assert (row["phase"], row["step"]) == ("phase", step)
        assert row["lr_adamw"] == pytest.approx(0.1 / step)
        assert {"loss", "grad_norm", "lr_adamw"} < row.keys()
        named = {key: value for key, value in (row | row["machine"]).items() if key not in ("phase", "step", "time", "machine")}
        assert values == {f"phase/{key}": value for key, value in named.items()}
        assert ("tflop_s" in row["machine"]) == (step > 2)  # the first two steps cost less
        if step > 2:
            assert row["machine"]["tflop_s"] == pytest.approx(row["machine"]["samples_s"] / 64 * 2 * 0.5)
        assert 0.01 < row["machine"]["memory_gib"] < 100
    assert rows(tmp_path)[1]["machine"]["checkpoint_s"] > 0


def test_another_work_folder_is_another_run(logged: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids: list[str] = []

    def make(**options: Any) -> Recorder:
        ids.append(options["id"])
        return Recorder(**options)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", make)
    logged("wandb")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train(tmp_path / name, 3)
    assert len(set(ids)) == 2


def test_a_tracker_that_does_not_start_is_one_sentence(
    logged: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Recorder):
        def start(self) -> None:
            raise RuntimeError("no api key")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    logged("wandb")
    with pytest.raises(MachineError, match=r"wandb does not start \(no api key\); .*--set log.trackers=\[\]"):
        train(tmp_path, 3)


def test_no_trackers_is_no_tracker(logged: Callable[..., None], tmp_path: Path) -> None:
    logged()
    train(tmp_path, 3)
    assert not (tmp_path / "tensorboard").exists() and [row["step"] for row in rows(tmp_path)] == [2, 3]


def test_tensorboard_shows_each_step_once_after_a_kill(logged: Callable[..., None], tmp_path: Path) -> None:
    """The second run begins anew, since nothing was saved, and its points replace those of the first."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged("tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, fail_at=5, checkpoint=CheckpointRecipe(every_s=1e9))
    train(tmp_path, 6)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "phase"))
    events.Reload()
    for key in ("loss", "lr_adamw", "memory_gib"):
        assert [event.step for event in events.Scalars(f"phase/{key}")] == [2, 4, 6]
    (picture,) = events.Images("phase/samples")
    assert (picture.step, picture.width, picture.height) == (3, 16, 8)
