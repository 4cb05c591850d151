"""Resuming, and refusing non-finite numbers."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

from flashgen.artifact.store import open_artifact
from flashgen.errors import MachineError, NumericsError
from flashgen.randomness import generator
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.checkpoint import Checkpoint, Stateful, checkpoints
from flashgen.training.ema import Ema
from flashgen.training.loop import Metric, descend, fit
from tests import runs

EVERY_STEP = CheckpointRecipe.model_construct(every_s=0.0, share=math.inf)
AT_THE_END = CheckpointRecipe(every_s=1e9)


class Regression:
    """A linear layer under Adam with an EMA; step 7 may be told to fail once."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = Ema(self.model, 0.9)
        self.fail_at, self.seen = fail_at, list[int]()

    def step(self, step: int) -> dict[str, Metric]:
        if step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(step)
        x = torch.randn(4, 3, generator=generator(2, step))
        loss = (self.model(x) - x[:, :2]).square().mean()
        _, norm = descend([loss], self.model.parameters(), [self.optimizer], clip=1.0, where=f"step {step}")
        self.ema.update(self.model, step)
        return {"loss": loss, "grad_norm": norm}

    def fit(self, work: Path, checkpoint: CheckpointRecipe = EVERY_STEP) -> None:
        state: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        fit("phase", 12, self.step, state, work, checkpoint, log_every=3)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()] + [v.clone() for v in self.ema.shadow.values()]


def rows(work: Path) -> list[dict[str, Any]]:
    """The lines of stats.jsonl without what depends on the machine."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("time", "machine")}
        for line in (work / "stats.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def uninterrupted(tmp_path: Path) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    run = Regression()
    run.fit(tmp_path / "reference")
    return run.weights(), rows(tmp_path / "reference")


@pytest.mark.parametrize("checkpoint", [EVERY_STEP, AT_THE_END], ids=["saved every step", "never saved before the end"])
@pytest.mark.parametrize("fail_at", [0, 1, 7, 9])
def test_fit_ends_the_same_bit_for_bit_when_it_was_interrupted(
    fail_at: int,
    checkpoint: CheckpointRecipe,
    uninterrupted: tuple[list[torch.Tensor], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda saved: saved.recipe is EVERY_STEP)  # also while the one before is written
    with pytest.raises(KeyboardInterrupt):
        Regression(fail_at).fit(tmp_path, checkpoint)
    again = Regression()
    again.fit(tmp_path, checkpoint)
    assert again.seen == list(range(fail_at if checkpoint is EVERY_STEP else 0, 12))
    assert all(torch.equal(a, b) for a, b in zip(again.weights(), uninterrupted[0], strict=True))
    assert rows(tmp_path) == uninterrupted[1] and [r["step"] for r in rows(tmp_path)] == [3, 6, 9, 12]


def test_fit_does_nothing_when_it_had_finished(uninterrupted: tuple[list[torch.Tensor], list[dict[str, Any]]], tmp_path: Path) -> None:
    again = Regression(fail_at=0)
    again.fit(tmp_path / "reference")
    assert again.seen == [] and all(torch.equal(a, b) for a, b in zip(again.weights(), uninterrupted[0], strict=True))
    assert rows(tmp_path / "reference") == uninterrupted[1]


def test_fit_keeps_rows_of_other_phases_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Regression(fail_at=4).fit(tmp_path)
    other = json.dumps({"phase": "other", "step": 99, "time": 0, "loss": 1.0})
    stats = tmp_path / "stats.jsonl"
    stats.write_text(other + "\n" + stats.read_text() + '{"phase": "phase", "ste')
    Regression().fit(tmp_path)
    assert [(r["phase"], r["step"]) for r in rows(tmp_path)] == [("other", 99), ("phase", 3), ("phase", 6), ("phase", 9), ("phase", 12)]


def test_fit_averages_metrics_over_the_rows_window(tmp_path: Path) -> None:
    fit("mean", 5, lambda step: {"value": float(step)} | ({"rare": 7.0} if step == 1 else {}), {}, tmp_path, log_every=2)
    assert [(r["step"], r["value"], r.get("rare")) for r in rows(tmp_path)] == [(2, 0.5, 7.0), (4, 2.5, None), (5, 4.0, None)]


def test_the_training_goes_on_while_a_checkpoint_is_written_and_another_one_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), state_dict_saver.save

    def slow(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(state_dict_saver, "save", slow)
    run, step = Regression(), Regression.step

    def stepped(self: Regression, number: int) -> dict[str, Metric]:
        if number == 9:
            assert not list((tmp_path / "checkpoints" / "phase").glob("step-*"))  # the first one, of step 1, is still being written
            go_on.set()
        return step(self, number)

    monkeypatch.setattr(Regression, "step", stepped)
    run.fit(tmp_path)
    assert run.seen == list(range(12)) and [path.name for path in checkpoints(tmp_path / "checkpoints" / "phase")] == ["step-000012"]
    again = Regression()
    again.fit(tmp_path)
    assert not again.seen and all(torch.equal(a, b) for a, b in zip(again.weights(), run.weights(), strict=True))


def test_a_checkpoint_that_cannot_be_written_stops_the_training_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = state_dict_saver.save, list[int]()

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # two at least are written, one of them after the last step
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(state_dict_saver, "save", full)
    with pytest.raises(MachineError, match=r"phase could not be written \(.*No space left on device\); the one before is whole"):
        Regression().fit(tmp_path)
    assert len(checkpoints(tmp_path / "checkpoints" / "phase")) == 1


@pytest.mark.parametrize("broken", ["nan loss", "inf loss", "inf gradient", "nan gradient"])
def test_descend_raises_before_a_weight_changes_when_something_is_not_finite(broken: str) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(2):  # Adam has moments, so that even a zero gradient would move the weight
        descend([weight.square().sum()], [weight], [optimizer], clip=1.0, where="start")
    before, moments = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    losses = {
        "nan loss": weight.sum() * float("nan"),
        "inf loss": weight[0] * 1e30 * 1e30,
        "inf gradient": (weight - weight.detach()).sqrt().sum(),  # finite (zero) loss, infinite slope
        "nan gradient": ((weight - weight.detach()).sqrt() * 0).sum(),
    }
    assert torch.isfinite(losses["inf gradient"]) and torch.isfinite(losses["nan gradient"])
    with pytest.raises(NumericsError, match=r"teacher step 7.*before the optimizer step.*--set"):
        descend([losses[broken]], [weight], [optimizer], clip=1.0, where="teacher step 7")
    assert torch.equal(weight, before) and torch.equal(optimizer.state[weight]["exp_avg"], moments)
    assert NumericsError.exit_code == 4


def test_descend_clips_the_norm_forgets_old_gradients_and_reports_the_norm_before() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for expected in ([2.4, 3.2], [1.8, 2.4]):
        _, norm = descend([10 * weight.square().sum() / 2], [weight], [optimizer], clip=1.0, where="")
        assert torch.allclose(weight.detach(), torch.tensor(expected))
        assert norm.item() == pytest.approx(10 * (torch.tensor(expected) * 1.0).norm().item() + 10)


RUN = """
import os, signal, sys
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_pre_hook
from flashgen.recipe.load import load
from flashgen.stages.base import run
from flashgen.stages.distill import Distill
left = int(sys.argv[3])
def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_pre_hook(count)
run(Distill, {"teacher": sys.argv[1]}, Path(sys.argv[2]), load("shapes-demo", sys.argv[4:]))
"""


def test_a_distillation_that_is_killed_in_each_of_its_trainings_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at an optimizer step of each training, then the same command to its end."""
    runs.random("tiny", tmp_path / "teacher")
    settings = ["distill.trajectory.prompts=300", "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=60",
                "distill.trajectory.batch=8", "distill.on_policy.iterations=30", "distill.on_policy.batch=8",
                "distill.on_policy.prompts=150", "distill.matching.iterations=40", "distill.matching.prompts=16",
                "distill.matching.batch=4", "distill.trajectory.muon_lr=0", "distill.on_policy.muon_lr=0",
                "distill.matching.muon_lr=0", "distill.matching.fake_score_muon_lr=0", "distill.matching.fake_score_warmup=0",
                "bench.per_task=1", "checkpoint.every_s=0.001", "checkpoint.share=1"]  # fmt: skip

    def start(out: Path, steps: int = 0) -> int:
        command = [sys.executable, "-c", RUN, str(tmp_path / "teacher"), str(out), str(steps), *settings]
        return subprocess.run(command, check=False).returncode

    assert start(tmp_path / "whole") == 0
    for steps in (40, 40, 60):  # in the regression, on-policy, and in the matching, wherever the last checkpoint was
        assert start(tmp_path / "cut", steps) == -signal.SIGKILL
    assert start(tmp_path / "cut") == 0
    whole, cut = ({f.path: f.sha256 for f in open_artifact(tmp_path / name).manifest.files} for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and [name for name in whole if whole[name] != cut[name]] == ["stats.jsonl"]  # has times
