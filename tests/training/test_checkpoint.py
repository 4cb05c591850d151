"""How often a checkpoint is saved, and that a kill leaves a whole file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashgen.artifact.files import fsync
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training import checkpoint
from flashgen.training.checkpoint import Checkpoint, save_state, truncate_stats


def test_save_state_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    for value in (1, 2):
        save_state({"value": torch.tensor(value)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["value"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = os.replace

    def synced(path: Path) -> None:
        events.append(f"fsync {path.name}")
        fsync(path)

    def replaced(source: Path, target: Path) -> None:
        events.append(f"replace {source.name} {target.name}")
        replace(source, target)

    monkeypatch.setattr(checkpoint, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save_state({}, tmp_path / "a.pt")
    (tmp_path / "stats.jsonl").write_text('{"phase": "a", "step": 1}\n{"phase": "a", "step": 2}\n')
    truncate_stats(tmp_path / "stats.jsonl", "a", 1)
    assert events == ["fsync a.tmp", "replace a.tmp a.pt", "fsync stats.tmp", "replace stats.tmp stats.jsonl"]
    assert [json.loads(row)["step"] for row in (tmp_path / "stats.jsonl").read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    ("every_s", "share", "save_s", "step_s", "expected"),
    [
        pytest.param(60.0, 0.05, 1.0, 10.0, [6, 12, 18], id="cheap: every_s decides"),
        pytest.param(10.0, 0.05, 2.0, 10.0, [1, 5, 9, 13, 17], id="2 s are 5 % of 40 s: share decides"),
        pytest.param(10.0, 1.0, 25.0, 10.0, [1, 4, 7, 10, 13, 16], id="dear: half of the time at most"),
    ],
)
def test_checkpoints_are_as_far_apart_as_the_recipe_says_and_their_cost_demands(
    every_s: float, share: float, save_s: float, step_s: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0

    def save(state: object, path: Path) -> None:
        nonlocal clock
        clock += save_s

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(checkpoint, "save_state", save)
    saved, steps = Checkpoint(tmp_path / "a.pt", {}, CheckpointRecipe(every_s=every_s, share=share)), []
    for step in range(1, 19):
        clock += step_s
        if saved.due():
            saved.save(step, [])
            steps.append(step)
    assert steps == expected
