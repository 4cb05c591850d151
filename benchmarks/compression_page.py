"""The page of `benchmarks.compression`: three tables, and a plot of the error of each quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.scores import interval, ratio_interval
from flashgen.worlds.shapes.scene import TASKS

ABOUT = """
`make compression` writes this page, [its raw numbers](compression.json) and the plot. All rows use the same student, the same 360 prompts
and the same noise, none of which any stage uses. Intervals are 95 %, by bootstrap over prompts. Mean bits count the weights of all Linear
layers of the transformer with their scales and zero points. Latent error is |z - z*|^2 / |z*|^2, where z* are the final latents of the
student; PSNR compares pictures; distance and FD are in VAE-PCA64 (defined in `benchmarks/distribution.py`), from the student's pictures.
Other projects' quantizers run through their own packages at 4 bits in groups of 32 (NF4: 64); weights that they do not quantize count
2 bytes each."""
STEP = """Step: median time of one transformer call for one picture, relative to `full`, interleaved. Adapter: prune that trains only the
embedder of CLIP's tokens. Compact: a small T5 replaces the large one, trained through the frozen student; with embedding loss, trained to
reproduce the tokens of the large one."""
CHAIN = ("nearest, 4.25 bits by damage", "+ GPTQ", "+ adaLN on a shared basis")  # `flashgen, 4.25 bits` adds the next ingredient


def page(kept: dict[str, Any], plot: str) -> str:
    """The report in Markdown."""
    heads = ["encoder", "composition", "over full", *TASKS, "T5 MB", "tokens", "step"]
    lines = ["# Compression", ABOUT, "", "## A. Encoders", "", *table(heads)]
    full = np.array(kept["encoders"]["full"]["passed"], float)
    for name, row in kept["encoders"].items():
        passed = np.array(row["passed"], float)
        ratio, low, high = ratio_interval(passed, full)
        tasks = (f"{t:.2f}" for t in passed.reshape(len(TASKS), -1).mean(1))
        rest = f"{row['t5_bytes'] / 1e6:.2f}", str(row["tokens"]), f"{row['step_ratio']:.2f} x"
        lines.append(cells(name, f"{passed.mean():.3f}", f"{ratio:.3f} [{low:.3f}, {high:.3f}]", *tasks, *rest))
    lines += ["", STEP, ""]
    rows = kept["weights"]
    peers = [name for name in rows if name not in CHAIN]
    lines += ["## B. Weights", "", f"![error of the final latents per quantizer]({plot})", "", *_weights(rows, peers), ""]
    chain = _weights(rows, [name for name in (*CHAIN, "flashgen, 4.25 bits") if name in rows])
    lines += [
        "## C. What each ingredient adds, at 4.25 mean bits",
        "",
        *chain,
        "",
        "The last row adds step scales (`quantize.step_scales`).",
    ]
    return "\n".join(lines)


def _weights(rows: dict[str, Any], names: list[str]) -> list[str]:
    heads = ["weights", "mean bits", "latent error", "PSNR dB", "distance", "FD", "composition", "over the student"]
    lines, student = table(heads), np.array(rows["student, fp32"]["passed"], float)
    for name in names:
        row = rows[name]
        error, low, high = _mean(row["latent_error"])
        near = ("0", "") if name == "student, fp32" else (f"{error:.4f} [{low:.4f}, {high:.4f}]", f"{np.mean(row['psnr']):.1f}")
        passed = np.array(row["passed"], float)
        ratio, least, most = ratio_interval(passed, student)
        over = f"{ratio:.3f} [{least:.3f}, {most:.3f}]"
        rest = (f"{np.mean(row['apart']):.2f}", f"{row['fd']:.3f}", f"{passed.mean():.3f}", over)
        lines.append(cells(name, f"{row['mean_bits']:.2f}", *near, *rest))
    return lines


def _mean(values: list[float]) -> tuple[float, float, float]:
    return interval(np.array([values], float))


def table(heads: list[str]) -> list[str]:
    """Head lines of a Markdown table."""
    return [cells(*heads), "|---" * len(heads) + "|"]


def cells(*cells: str) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def draw(kept: dict[str, Any], path: Path) -> None:
    """Plot the mean latent error of each quantizer with its interval, fewest bits on top."""
    rows = [(float(row["mean_bits"]), name, row) for name, row in kept["weights"].items() if name not in ("student, fp32", *CHAIN)]
    rows.sort(key=lambda row: row[0], reverse=True)
    figure = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, name, row) in enumerate(rows):
        value, low, high = _mean(row["latent_error"])
        error: NDArray[np.float64] = np.array([[value - low], [high - value]])
        axes.errorbar(value, place, xerr=error, fmt="o", color="C0" if name.startswith("flashgen") else "C7", capsize=3)
    axes.set_yticks(
        range(len(rows)), [f"{name.partition(',')[0] if name.startswith('flashgen') else name} ({bits:.2f})" for bits, name, _ in rows]
    )
    axes.set_xscale("log")
    axes.set_xlabel("error of the final latents, 95 %\n(mean bits per weight, scales and zero points included)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
