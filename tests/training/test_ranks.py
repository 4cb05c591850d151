"""Several processes as one: the rows they draw, and a two-process run against a one-process one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("options", "settings", "word"),
    [
        pytest.param(
            MULTI,
            [
                "distill.on_policy.iterations=10",
                "distill.on_policy.batch=8",
                "distill.on_policy.prompts=150",
                "distill.trajectory.guidance=30",  # a target that outweighs the fp16 rounding of the student's states
                "distill.matching.node_adversarial=[0, 1, 0, 0]",  # so that one process may have nothing to judge
            ],
            "matching: each batch shared out over 2 processes",
            id="shared batches",
        ),
        pytest.param(FSDP, ["distill.trajectory.muon_lr=0"], "FSDP2: the first process keeps", id="FSDP2"),
    ],
)
def test_two_processes_give_the_loss_curve_of_one(options: list[str], settings: list[str], word: str, tmp_path: Path) -> None:
    """`accelerate launch`, gloo, the same global batch. Tolerance: 1e-3 relative, what another order of sums grows to in 60 steps."""
    runs.random("tiny", tmp_path / "teacher")
    sets = [part for text in [*MICRO, *settings] for part in ("--set", text)]
    arguments = ["distill", str(tmp_path / "teacher"), "--recipe", "shapes-demo", *sets]
    launch = ["-m", "accelerate.commands.launch", *options, "--num_processes", "2", "-m", "flashgen"]
    curves, weights = {}, {}
    for name, how in (("one", ["-m", "flashgen"]), ("two", launch)):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, *how, *arguments, "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == [str(out / "v0001")]  # one process prints
        assert (word in done.stderr) == (name == "two")
        assert [v.name for v in versions(out)] == ["v0001"] and [p.name for p in (out / ".work").iterdir()] == ["cache"]
        curves[name] = [json.loads(row) for row in (out / "v0001" / "stats.jsonl").read_text().splitlines()]
        weights[name] = load_file(next((out / "v0001" / "transformer").glob("*.safetensors")))
    assert [(r["phase"], r["step"]) for r in curves["one"]] == [(r["phase"], r["step"]) for r in curves["two"]]
    for one, two in zip(curves["one"], curves["two"], strict=True):
        for key in one.keys() - {"phase", "step", "time", "machine", *PARTIAL}:
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["phase"], one["step"], key)
    for key, tensor in weights["one"].items():
        torch.testing.assert_close(weights["two"][key].float(), tensor.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("name", "value"), [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_DEEPSPEED", "true")])
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


def test_fsdp_refuses_what_it_cannot_shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="muon_lr=0"):
        runs.distill("shapes", tmp_path / "out", load("shapes-demo"))
    with pytest.raises(UsageError, match="finetune does not shard networks"):
        runs.finetune(tmp_path / "student", tmp_path / "out", load("shapes-demo"))
