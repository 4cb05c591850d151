"""A training that stops and goes on with another number of processes, or sharded, has the loss curve of one that does not stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashgen.artifact.store import Artifact
from tests import runs
from tests.training.test_ranks import FSDP, MULTI

STEPS, SETTINGS = 12, [
    "distill.trajectory.prompts=32", "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=4", "distill.trajectory.batch=4",
    "distill.trajectory.muon_lr=0", "distill.matching.muon_lr=0", "distill.matching.fake_score_muon_lr=0", "distill.matching.batch=4",
    "distill.matching.iterations=10", "distill.matching.fake_score_warmup=2", "distill.matching.prompts=16", "bench.per_task=0",
]  # fmt: skip
STOP_AT = """
import sys
from flashgen.cli.app import main
from flashgen.runtime.processes import wait_for_all
from flashgen.training.checkpoint import Checkpoint
stop, save = int(sys.argv.pop(1)), Checkpoint.save
Checkpoint.due = lambda self: True
def save_and_stop(self, step, window):
    save(self, step, window)
    if (self.folder.name, step) == ("matching", stop):
        self.close()
        wait_for_all()  # the launcher stops all processes when one has stopped
        sys.exit(9)
Checkpoint.save = save_and_stop
main()
"""
ONE: list[str] = []


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.random("tiny", tmp_path_factory.mktemp("layouts") / "teacher")


@pytest.fixture(scope="module")
def straight(teacher: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version of one process that did not stop."""
    out = tmp_path_factory.mktemp("layouts") / "out"
    go_on(teacher, out, ONE, 0)
    return out / "v0001"


def go_on(teacher: Artifact, out: Path, how: list[str], stop: int) -> None:
    """Run to step `stop` of the matching, 0: to the end, with the launcher's options `how`, none: one process."""
    script = out.parent / "stop_at.py"
    script.write_text(STOP_AT)
    launch = ["-m", "accelerate.commands.launch", *how, "--num_processes", "2"] if how else []
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, *launch, script, str(stop), "distill", str(teacher.path), "--recipe", "shapes-demo", *sets, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (stop == 0), done.stderr[-3000:]
    if stop:
        assert [path.name for path in out.glob(".work/*/checkpoints/matching/step-*")] == [f"step-{stop:06d}"], done.stderr[-3000:]


@pytest.mark.parametrize(
    "layouts",
    [pytest.param([ONE, MULTI, ONE], id="1, 2, 1 processes"), pytest.param([MULTI, FSDP, ONE], id="DDP, FSDP2, one process")],
)
def test_a_training_goes_on_in_another_layout_on_the_same_curve(
    layouts: list[list[str]], teacher: Artifact, straight: Path, tmp_path: Path
) -> None:
    """Twelve rounds, of which each layout does four. Tolerance: 1e-3, another order of sums."""
    for how, stop in zip(layouts, (4, 8, 0), strict=True):
        go_on(teacher, tmp_path / "out", how, stop)
    curves = [
        [json.loads(row) for row in (version / "stats.jsonl").read_text().splitlines()]
        for version in (straight, tmp_path / "out" / "v0001")
    ]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]] and curves[0][-1]["step"] == STEPS
    for expected, row in zip(*curves, strict=True):
        for key in expected.keys() - {"phase", "time", "machine"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3), (row["phase"], row["step"], key)
    weights = [load_file(next((version / "transformer").glob("*.safetensors"))) for version in (straight, tmp_path / "out" / "v0001")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), value.float(), rtol=1e-2, atol=2e-3)
