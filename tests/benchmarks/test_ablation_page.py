"""The ablation's page: differences between rows pair runs of the same steps and seed, also over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.ablation import kept_runs
from benchmarks.ablation_page import draw, page
from benchmarks.scores import keep
from flashgen.worlds.shapes.scene import TASKS

DISTANCES = {"fd_teacher": 1.0, "fd_true": 2.0, "recall_teacher": 0.9, "recall_true": 0.8, "diversity": 9.0}


def scored(right: int, **others: Any) -> dict[str, Any]:
    """A run of two prompts per task, the first `right` of which pass."""
    prompts = 2 * len(TASKS)
    without = {key: [value] * 10 for key, value in DISTANCES.items()}
    return {"passed": [1] * right + [0] * (prompts - right), **DISTANCES, "without": without, "forwards": 600.0, "seconds": 1.0, **others}


def kept(right: dict[tuple[int, int], tuple[int, int]]) -> dict[str, Any]:
    """`right` prompts of (trajectory, shared) by (steps, seed)."""
    runs = [
        scored(of[place], row=row, steps=steps, seed=seed)
        for place, row in enumerate(("trajectory", "shared"))
        for (steps, seed), of in right.items()
    ]
    return {"teacher": scored(12), "runs": runs}


def differences(text: str) -> list[float]:
    return [float(line.split(": ")[1].split()[0]) for line in text.splitlines() if line.startswith("* shared minus trajectory")]


def test_differences_by_steps_then_of_all_runs_together() -> None:
    text = page(kept({(4, 0): (6, 12), (2, 0): (6, 9), (2, 1): (9, 9)}), "plot.png")
    assert differences(text) == [0.5, 0.125, 0.25]  # 4 steps; 2 steps, two seeds; the three runs
    assert text.index("## 4 steps") < text.index("## 2 steps") < text.index("## All steps")


def test_runs_without_their_pair_do_not_count() -> None:
    runs = kept({(4, 0): (6, 12), (2, 0): (6, 9)})
    runs["runs"] = [run for run in runs["runs"] if (run["row"], run["steps"]) != ("trajectory", 2)]
    assert differences(page(runs, "plot.png")) == [0.5, 0.5]


def test_one_number_of_steps_has_no_sum_and_a_note_is_shown() -> None:
    text = page(kept({(4, 0): (6, 12)}) | {"note": "Made by hand."}, "plot.png")
    assert "together" not in text
    assert "Made by hand." in text


def test_the_plot_has_a_panel_per_number_of_steps(tmp_path: Path) -> None:
    draw(kept({(4, 0): (6, 12), (2, 0): (6, 9)}), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_go_on_where_they_are_of_the_same_recipe_and_those_of_another_stay(tmp_path: Path) -> None:
    work, published = tmp_path / "runs.json", tmp_path / "page.json"
    keep(published, {"key": "old", "teacher": None, "runs": [1, 2]})
    assert kept_runs("new", work, published) == {"key": "new", "teacher": None, "runs": []}
    assert kept_runs("old", work, published)["runs"] == [1, 2]
    keep(work, {"key": "old", "teacher": None, "runs": [1, 2, 3]})
    assert kept_runs("old", work, published)["runs"] == kept_runs("old", published, work)["runs"] == [1, 2, 3]
    assert json.loads(published.read_text())["runs"] == [1, 2]
