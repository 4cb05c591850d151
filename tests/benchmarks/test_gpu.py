"""The GPU script: every part runs to its end in small, parts survive kills and failures, and the page says what was not reached."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_page import page
from benchmarks.gpu_setup import TINY, Bench
from flashgen.runtime.machines import bf16_peak

ROOT = Path(__file__).parents[2]
ABOUT = {
    "device": "NVIDIA H100 80GB HBM3", "device_bytes": 85e9, "driver": "570.1", "host": "EPYC", "torch": "2.13.0+cu130",
    "peak_flop_per_s": 989e12, "code": "abc", "date": "2026-12-01", "commit": "31aa0af",
}  # fmt: skip
ON_PRETEND_DEVICE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from tests.accelerator.pretend_device import DEVICE
from benchmarks.gpu import PARTS
from benchmarks.gpu_setup import TINY, Bench
from flashgen.runtime.machines import bf16_peak
bench = Bench(DEVICE, replace(TINY, precision="float32", batches=(1,), micro_batches=(1,)), Path(sys.argv[1]), None)
rows = {name: list(part(bench)) for name, (part, _) in PARTS.items()}
assert all(rows.values()), rows
assert all(row.get("metrics", 0) < 1e-3 and row.get("update", 0) < 0.05 for row in rows["compare"]), rows["compare"]
"""


def fake(*rows: dict[str, Any], error: Exception | None = None, seconds: float = 0) -> Callable[[Bench], Iterator[dict[str, Any]]]:
    """A part that gives `rows`, then fails or takes its time."""

    def part(_: Bench) -> Iterator[dict[str, Any]]:
        yield from rows
        if error:
            raise error
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            time.sleep(0.01)

    return part


def numbers(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def test_every_part_runs_to_its_end_in_small(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    assert gpu.main(["--tiny", "--page", str(path)]) == 0
    parts = numbers(path)["parts"]
    assert list(parts) == list(gpu.PARTS) and all(part["rows"] and part["seconds"] for part in parts.values())
    assert all(row.get("psnr_db") is None and row.get("metrics", 0) == 0 for row in parts["compare"]["rows"])  # the CPU against itself
    assert {row["pass"] for row in parts["passes"]["rows"]} == {"F", "F + B"} and len(parts["passes"]["rows"]) == 10
    assert parts["lora"]["rows"][0]["plan_bytes"] > 0 and [row["micro_batch"] for row in parts["full"]["rows"]] == [1, 2]
    assert all(row["teacher"]["steps"] > row["student"]["steps"] for row in parts["drawing"]["rows"])
    text = path.read_text()
    assert "no number below means anything" in text and "Not run yet" not in text and "failed" not in text


def test_every_part_keeps_its_tensors_on_the_device(tmp_path: Path) -> None:
    """On the pretended accelerator, where a tensor that is left on the CPU raises."""
    done = subprocess.run([sys.executable, "-c", ON_PRETEND_DEVICE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_parts_that_fail_or_take_too_long_are_on_the_page_and_run_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, row = tmp_path / "gpu.md", {"numbers": "fp32", "what": "picture", "psnr_db": 50.0}
    broken = fake(error=RuntimeError("CUDA error: it broke\nmore"))
    monkeypatch.setattr(gpu, "PARTS", {"full": (broken, 9), "compare": (fake(row, seconds=9), 0.2), "lora": (fake(), 9)})
    facts, bench = gpu.about(torch.device("cpu"), None), Bench(torch.device("cpu"), TINY, tmp_path, None)
    assert not gpu.measure(bench, path, facts)
    parts, text = numbers(path)["parts"], path.read_text()
    assert parts["compare"]["rows"] == [row] and parts["compare"]["error"] == "TimeoutError: stopped after its 0.2 seconds"
    assert "seconds" in parts["lora"] and "RuntimeError: CUDA error: it broke" in text and "| fp32 | picture |  |  | 50.0 |" in text
    refuses = fake(error=AssertionError("this part is finished"))
    monkeypatch.setattr(gpu, "PARTS", {"full": (fake(), 9), "compare": (fake(row), 9), "lora": (refuses, 9)})
    assert gpu.main(["--tiny", "--page", str(path)]) == 0
    assert gpu.main(["--tiny", "--page", str(path), "--peak-tflops", "3"]) == 1  # other facts: nothing is kept
    assert "this part is finished" in path.read_text()


def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--page", str(tmp_path / "gpu.md")]) == 5
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "needs a CUDA GPU" in err and "--tiny" in err
    assert not list(tmp_path.iterdir())


def test_the_committed_page_is_that_of_the_committed_numbers() -> None:
    assert (ROOT / "docs/gpu.md").read_text() == page(numbers(ROOT / "docs/gpu.md"))
    nobody = page({"about": None, "parts": {}})
    assert "No GPU has run it yet" in nobody and nobody.count("Not run yet.") == nobody.count("\n## ") == len(gpu.PARTS)


def test_a_peak_is_the_data_sheets_or_the_users_and_never_a_guess() -> None:
    assert bf16_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert bf16_peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert (
        gpu.about(torch.device("cpu"), None)["peak_flop_per_s"] is None and gpu.about(torch.device("cpu"), 300)["peak_flop_per_s"] == 300e12
    )


def test_the_page_marks_missed_goals() -> None:
    lora = {
        "batch": 16, "micro_batch": 8, "tokens": 1357, "seconds": 2.0, "spread": 0.01, "samples_per_s": 8.0, "tflop_per_s": 371.0,
        "share": 0.375, "share_needed": 0.316, "peak_bytes": 20e9, "plan_bytes": 19e9, "plan_over_peak": 0.95,
    }  # fmt: skip
    full = {"micro_batch": 4, "batch": 4, "size_px": 1024, "seconds": 5.0, "host_gib": 30.0, "peak_bytes": 76e9, "plan_bytes": 60e9}
    passes = {"network": "frozen", "tokens": 1357, "batch": 16, "pass": "F", "note": "out of memory"}
    rows = {"lora": [lora], "full": [full | {"plan_over_peak": 60 / 76}], "passes": [passes]}
    text = page({"about": ABOUT, "parts": {name: {"rows": found, "seconds": 1.0} for name, found in rows.items()}})
    assert "NVIDIA H100 80GB HBM3, 85.0 GB (dense bf16 peak 989 TFLOP/s); driver 570.1, torch 2.13.0+cu130" in text and "31aa0af" in text
    assert "| 38% **missed** | 32% | 20.0 | 19.0 (0.95 x) |" in text
    assert "| 76.0 **missed** | 60.0 (0.79 x) **missed** |" in text and "| frozen | F | 16 | out of memory |" in text
    reached = page({"about": ABOUT, "parts": {"lora": {"rows": [lora | {"share": 0.4}], "seconds": 1.0}}})
    assert "missed" not in reached.split("## A round of LoRA training")[1]
    small = page({"about": ABOUT, "parts": {"full": {"rows": [{"note": "not run: the device has 24.0 GB"}], "seconds": 0.0}}})
    assert "Not run: the device has 24.0 GB." in small
