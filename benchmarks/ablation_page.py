"""The page of `benchmarks.ablation`: tables, differences between rows, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.scores import half_interval, interval
from flashgen.worlds.shapes.scene import TASKS

ABOUT = """
Each row starts from the base student of its seed (trajectory guidance alone, `recipes/ablation.yaml`) and spends the same number of
forward passes with the same hyper-parameters. Scores are on 240 prompts, and on 36 more drawn 8 times each, which no stage uses.
`control`, `split + merge` and `two experts` spend the first half on `shared`. A row is an edit of `distill.matching`: see `MATCHING`
in `benchmarks/ablation_rows.py`.

F is one transformer forward pass of one sample; a backward pass counts 2. Distances, recall and diversity (mean distance between the
pictures of one prompt) are in VAE-PCA64 (defined in `benchmarks/distribution.py`). Variance is the variance of the direction at x0 over
8 redraws of one prompt, relative to its mean square; "given z" holds the initial noise fixed. Intervals are 95 %: for composition a
bootstrap over seeds and prompts, for distances (±) a jackknife over prompts and the spread of seeds. Seconds are wall time on one core for
training and scoring, and noisy."""


def table(runs: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Verdicts as an array [runs, prompts]."""
    return np.array([r["passed"] for r in runs], float)


# Column heads of the second table, and the keys of a run that they show.
COLUMNS = {
    "FD to teacher": "fd_teacher", "FD to true": "fd_true", "recall of teacher": "recall_teacher", "recall of true": "recall_true",
    "diversity": "diversity", "variance": "variance", "variance given z": "variance_given_z", "F per update": "per_update",
    "F": "forwards", "seconds": "seconds",
}  # fmt: skip
PAIRS = (
    ("shared", "re-noise (DMD2)"), ("shared", "re-noise, fake score on rollouts"), ("shared", "shared, fake score on steps"),
    ("shared", "shared, last step interpolated"), ("shared", "interval"), ("shared", "trajectory"),
    ("shared + adversarial", "shared"), ("split + merge", "control"), ("two experts", "control"),
)  # fmt: skip


def _rows(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["row"] for r in runs))


def page(kept: dict[str, Any], plot: str) -> str:
    """The report in Markdown; rows in the order of the runs."""
    teacher, runs = kept["teacher"], kept["runs"]
    lines = ["# Ablation", "", f"`make ablation` writes this page, [its raw numbers](ablation.json) and the plot. {ABOUT}", ""]
    lines += [kept["note"], ""] if "note" in kept else []
    distances = f"FD to true scenes {teacher['fd_true']:.2f}, recall of true scenes {teacher['recall_true']:.2f}"
    lines += [f"The teacher, 28 steps, guided: composition {np.mean(teacher['passed']):.3f}, {distances}, "
              f"diversity {teacher['diversity']:.2f}.", "", f"![composition]({plot})", ""]  # fmt: skip
    for steps in sorted({r["steps"] for r in runs}, key=lambda s: (s != 4, s)):
        mine = [r for r in runs if r["steps"] == steps]
        rows = {row: [r for r in mine if r["row"] == row] for row in _rows(runs)}
        seeds = sorted({r["seed"] for r in mine})
        lines += [f"## {steps} steps, seeds {', '.join(map(str, seeds))}", "", *_table(["row", "composition", *TASKS])]
        for row, own in rows.items():
            if own:
                value, low, high = interval(table(own))
                tasks = table(own).reshape(len(own), len(TASKS), -1).mean((0, 2))
                lines.append(_cells(row, f"{value:.3f} [{low:.3f}, {high:.3f}]", *(f"{t:.2f}" for t in tasks)))
        lines += ["", *_table(["row", *COLUMNS])]
        lines += [_cells(row, *(_mean(own, key) for key in COLUMNS.values())) for row, own in rows.items() if own]
        lines += ["", *_differences(mine), ""]
    if len({r["steps"] for r in runs}) > 1:
        lines += ["## All steps and seeds together", "", *_differences(runs), ""]
    return "\n".join(lines)


def _table(heads: list[str]) -> list[str]:
    return [_cells(*heads), "|---" * len(heads) + "|"]


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(own: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in own if r.get(key) is not None]
    spread = f" ± {half_interval(own, key):.2f}" if key in own[0].get("without", {}) else ""
    return f"{np.mean(values):.{0 if np.mean(values) >= 100 else 2}f}{spread}" if values else ""


def _differences(runs: list[dict[str, Any]]) -> list[str]:
    """Differences in composition between runs of the same steps, seed, prompts and noise."""
    lines = []
    for a, b in PAIRS:
        ours, theirs = ({(r["steps"], r["seed"]): r for r in runs if r["row"] == row} for row in (a, b))
        both = sorted(ours.keys() & theirs.keys())
        if both:
            value, low, high = interval(table([ours[run] for run in both]) - table([theirs[run] for run in both]))
            lines.append(f"* {a} minus {b}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def draw(kept: dict[str, Any], path: Path) -> None:
    """Plot the composition of each row with its interval, one panel per number of steps."""
    every, rows = sorted({r["steps"] for r in kept["runs"]}), _rows(kept["runs"])
    figure = Figure(figsize=(3 + 3 * len(every), 0.34 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for panel, steps in zip(panels, every, strict=True):
        for place, row in enumerate(rows):
            own = [r for r in kept["runs"] if r["row"] == row and r["steps"] == steps]
            if own:
                value, low, high = interval(table(own))
                color = "C0" if "shared" in row else "C7"
                panel.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
        panel.axvline(np.mean(kept["teacher"]["passed"]), color="k", lw=0.8, ls=":")
        panel.set_title(f"{steps} steps")
        panel.set_xlabel("composition, 95 %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)
