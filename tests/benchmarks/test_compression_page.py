"""The compression page shows every row with its own numbers, and the plot is drawn from the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compression_page import CHAIN, draw, page


def kept() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def row(bits: float, error: float) -> dict[str, Any]:
        return {
            "bytes": bits * 100, "mean_bits": bits, "passed": (rng.random(60) < 0.9).astype(int).tolist(),
            "latent_error": (error * rng.exponential(size=60)).tolist(), "psnr": [20.0] * 60, "apart": [1.5] * 60, "fd": 0.25,
        }  # fmt: skip

    weights = {"student, fp32": row(32, 0), "peer": row(4.5, 0.04), "flashgen, 4.25 bits": row(4.25, 0.01)}
    weights |= {name: row(4.25, 0.02) for name in CHAIN}
    encoder = {"bytes": 9, "t5_bytes": 2_500_000, "tokens": 32, "step_ms": 5.0, "step_ratio": 0.75}
    encoders = {name: encoder | {"passed": [1, 0] * 30} for name in ("full", "prune")}
    return {"key": "x", "weights": weights, "encoders": encoders}


def test_every_row_is_on_the_page_once_with_its_numbers() -> None:
    text = page(kept(), "plot.png")
    for name in ("student, fp32", "peer", *CHAIN, "full", "prune"):
        assert text.count(f"| {name} |") == 1
    parts = text.split("## ")
    assert [part.split()[0] for part in parts[1:]] == ["A.", "B.", "C."]
    assert "| prune | 0.500 | 1.000 [" in parts[1] and "| 2.50 | 32 | 0.75 x |" in parts[1]
    assert "| student, fp32 | 32.00 | 0 |  |" in parts[2] and all(name in parts[3] for name in (*CHAIN, "flashgen, 4.25 bits"))
    mean = np.mean(kept()["weights"]["peer"]["latent_error"])
    assert f"| peer | 4.50 | {mean:.4f} [" in parts[2]


def test_the_plot_is_written(tmp_path: Path) -> None:
    draw(kept(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
