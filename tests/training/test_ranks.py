"""Several processes as one: the rows they draw, and a two-process run against a one-process one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flashgen.artifact.store import versions
from flashgen.errors import UsageError
from flashgen.recipe.load import load
from flashgen.training.ranks import Draws, average_, summarise, summarise_ranks
from tests import runs

MICRO = [
    "distill.trajectory.prompts=300",
    "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=40", "distill.trajectory.batch=8",
    "distill.matching.iterations=20", "distill.matching.prompts=16", "distill.matching.batch=4", "bench.per_task=1",
]  # fmt: skip


def test_the_processes_share_out_the_rows_of_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[torch.Tensor]:
        g = Draws(6, 1, 2)
        return [g.randn(2, 3), g.rand(), g.randint(50), g.choice(torch.tensor([0.2, 0.8]))]

    full = drawn()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert Draws(6, 1).rows == 2 and all(torch.equal(part, batch[rank::3]) for part, batch in zip(drawn(), full, strict=True))
    with pytest.raises(UsageError, match="a batch of 7 cannot be shared by 3 processes"):
        Draws(7, 1)


def test_all_processes_draw_the_same_index_and_no_other_number_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def indices() -> list[int]:
        return [Draws(6, 1, 2, step).one_of(3) for step in range(40)]

    alone = indices()
    assert set(alone) == {0, 1, 2} and Draws(6, 1, 2).one_of(1) == 0
    asked, not_asked = Draws(6, 1, 2), Draws(6, 1, 2)
    asked.one_of(3)
    assert torch.equal(asked.randn(2), not_asked.randn(2))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert indices() == alone


def test_alone_nothing_is_averaged() -> None:
    tensor = torch.ones(2)
    average_([tensor])
    assert summarise_ranks({"loss": 2.0}) == {"loss": 2.0} and torch.equal(tensor, torch.ones(2))


def test_a_metric_is_averaged_over_the_rows_that_have_it_and_a_minimum_stays_one() -> None:
    rows = [{"loss": 1.0, "scale_min": 0.5}, {"loss": 3.0, "scale_min": 0.001}, {"loss": 5.0, "score": 0.9}]
    assert summarise(rows) == {"loss": 3.0, "scale_min": 0.001, "score": 0.9}


PARTIAL = {"std", "adversarial_raw", "adversarial_ratio", "heads_loss", "logit_real", "logit_fake"}  # of a part of the batch
MULTI = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP = ["--config_file", str(Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml")]
ADVERSARIAL = "node_adversarial=[0, 1, 0, 0]"  # so that one process may have nothing to judge
DENSE = [
    "distill.compile=false",  # docs/lab-log.md, 2026-11-30: with it the same holds, after ten minutes of compiling
    "distill.on_policy.iterations=10",
    "distill.on_policy.batch=8",
    "distill.on_policy.prompts=150",  # parts of 128: one process has nothing of its own to compute
    "distill.trajectory.guidance=30",  # a target that outweighs the fp16 rounding of the student's states
]
LORA = [
    "distill.compile=false",
    "distill.lora.rank=4",
    "distill.trajectory.muon_lr=0",
    "distill.matching.muon_lr=0",
    "distill.matching.fake_score_muon_lr=0",
    "compute.activation_checkpointing=true",
]
FINETUNE = [
    "distill.compile=false", "distill.trajectory.prompts=150", "distill.trajectory.teacher_steps=4", "finetune.matching.iterations=10",
    "finetune.matching.prompts=16", "finetune.matching.batch=4", f"finetune.matching.{ADVERSARIAL}", "finetune.merge_high=[0.7]",
    "finetune.allow_worse=1", "bench.per_task=1",
]  # fmt: skip
RESTRUCTURE = ["restructure.iterations=20", "restructure.prompts=70", "restructure.batch=4", "restructure.floor=0", "bench.per_task=1"]


@pytest.mark.parametrize("settings", [pytest.param(DENSE, id="dense"), pytest.param(LORA, id="LoRA")])
def test_two_processes_distill_as_one_does(settings: list[str], tmp_path: Path) -> None:
    """`accelerate launch`, gloo, the same global batch. Tolerance: 1e-3 relative, what another order of sums grows to in 60 steps."""
    runs.random("tiny", tmp_path / "teacher")
    sets = [*MICRO, f"distill.matching.{ADVERSARIAL}", *settings]
    curves, weights = {}, {}
    for name, options, word in (
        ("one", None, ""),
        ("DDP", MULTI, "matching: each batch shared out over 2 processes"),
        ("FSDP2", FSDP, "FSDP2: the first process keeps"),
    ):
        out = tmp_path / name
        done = flashgen(options, ["distill", str(tmp_path / "teacher")], out, sets)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == [str(out / "v0001")]  # one process prints
        assert word in done.stderr
        assert [v.name for v in versions(out)] == ["v0001"] and [p.name for p in (out / ".work").iterdir()] == ["cache"]
        curves[name], weights[name] = curve(out), load_file(next((out / "v0001" / "transformer").glob("*.safetensors")))
        assert_alike(curves["one"], curves[name])
        for key, tensor in weights["one"].items():
            torch.testing.assert_close(weights[name][key].float(), tensor.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        pytest.param(["finetune"], FINETUNE, id="finetune"),
        pytest.param(["restructure-encoder", "--mode", "prune"], RESTRUCTURE, id="restructure-encoder"),
    ],
)
def test_a_sharded_student_goes_on_as_a_whole_one_does(command: list[str], settings: list[str], tmp_path: Path) -> None:
    teacher, student = runs.random("tiny", tmp_path / "teacher"), tmp_path / "student"
    runs.distill(teacher.path, student, load("shapes-demo", [*MICRO, "distill.trajectory.prompts=8", "distill.matching.iterations=0"]))
    for name, options in (("one", None), ("FSDP2", FSDP)):
        done = flashgen(options, [command[0], str(student), *command[1:]], tmp_path / name, settings)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "FSDP2: the first process keeps" in done.stderr
    assert_alike(curve(tmp_path / "one"), curve(tmp_path / "FSDP2"))


def flashgen(options: list[str] | None, command: list[str], out: Path, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in one process, or in two as `accelerate launch` starts them with `options`."""
    launch = ["-m", "accelerate.commands.launch", *options, "--num_processes", "2"] if options else []
    sets = [part for text in settings for part in ("--set", text)]
    return subprocess.run(
        [sys.executable, *launch, "-m", "flashgen", *command, "--recipe", "shapes-demo", *sets, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def curve(out: Path) -> list[dict[str, Any]]:
    """Rows of the curves of the only version in `out`."""
    return [json.loads(row) for row in (out / "v0001" / "stats.jsonl").read_text().splitlines()]


def assert_alike(ones: list[dict[str, Any]], twos: list[dict[str, Any]]) -> None:
    assert [(r["phase"], r["step"]) for r in ones] == [(r["phase"], r["step"]) for r in twos]
    for one, two in zip(ones, twos, strict=True):
        for key in one.keys() - {"phase", "step", "time", "machine", *PARTIAL}:
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["phase"], one["step"], key)


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_DEEPSPEED", "true"), ("FSDP_OFFLOAD_PARAMS", "true")]
)
def test_a_launch_that_is_not_followed_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="not followed"):
        runs.distill("shapes", tmp_path / "out", load("shapes-demo"))
    with pytest.raises(UsageError, match="not followed"):
        runs.finetune(tmp_path / "student", tmp_path / "out", load("shapes-demo"))
    with pytest.raises(UsageError, match="not followed"):
        runs.restructure(tmp_path / "student", tmp_path / "out", load("shapes-demo"))
    with pytest.raises(UsageError, match="not followed"):
        runs.train(load("shapes-demo"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
