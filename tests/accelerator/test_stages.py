"""Every torch stage on an accelerator that is pretended, each case in a process of its own (see on_pretend_device.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("dense", "adapters", "finetune", "finetune adapters", "zeros", "prune", "compact", "gptq", "budget", "draw")


def run(case: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.accelerator.on_pretend_device", case, str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that the cases share."""
    return tmp_path_factory.mktemp("pretend")


@pytest.mark.parametrize("case", CASES)
def test_a_stage_gives_on_an_accelerator_what_it_gives_on_the_cpu(case: str, folder: Path) -> None:
    done = run(case, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_tensor_that_stays_on_the_cpu_fails_there(tmp_path: Path) -> None:
    done = run("dense", tmp_path, "--planted")
    assert done.returncode != 0 and "tensors on pretend:0 and on the CPU" in done.stderr
