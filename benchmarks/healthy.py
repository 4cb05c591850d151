"""Plots the statistics that every run writes, for a good run and three failures.

python -m benchmarks.healthy artifacts/healthy docs/healthy-run.png      # `make healthy-run`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from flashgen.artifact.store import open_artifact

PANELS = {
    "score": "composition, held-out prompts", "std": "std of the latents", "matching": "|fake score - teacher|",
    "augmentation": "size of guidance", "fake_score_loss": "fake score loss", "grad_norm": "gradient norm",
    "logits": "logit: real - fake", "adversarial_ratio": "adversarial / matching",
}  # fmt: skip


def curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each statistic of one run."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in (open_artifact(path).path / "stats.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "logit_real" in row:
            row["logits"] = row["logit_real"] - row["logit_fake"]
        for key in PANELS.keys() & row.keys():
            steps, values = found.setdefault(key, ([], []))
            steps.append(row["step"])
            values.append(row[key])
    return found


def main(runs: Path, out: Path) -> None:
    """Plot every run in `runs` to the PNG `out`."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 4).flat, strict=True))
    for key, panel in panels.items():
        panel.set_title(PANELS[key], fontsize=10)
        panel.grid(alpha=0.3)
    for path in sorted(runs.iterdir(), key=lambda p: not p.name.startswith("healthy")):
        for key, (steps, values) in curves(path).items():
            panels[key].plot(steps, values, label=path.name, lw=2.2 if path.name.startswith("healthy") else 1.2)
    figure.legend(*panels["std"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
