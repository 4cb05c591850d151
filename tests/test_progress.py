"""Lines of progress where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from flashgen import progress


def test_the_estimate_leaves_out_a_slow_first_item(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def items() -> Iterator[int]:
        yield from range(4)

    for item in progress.track(items(), "train", total=10, done=6, every_s=30):
        clock += 31 if item else 600  # the first compiles
    assert capsys.readouterr().err.splitlines() == [
        "train: 7/10", "train: 8/10, about 1.0 min left", "train: 9/10, about 0.5 min left", "train: 10/10, about 0.0 min left",
    ]  # fmt: skip


def test_a_table_leaves_out_columns_from_the_right_instead_of_cutting_them() -> None:
    row = {"step": 120.0, "samples_s": 12.345, "matching": 0.1, "fake_score_loss": 0.2, "std": 0.99, "grad_norm": 1.2, "scale_min": 0.1}
    for width in (40, 60, 79, 80):
        console = Console(width=width, file=StringIO())
        console.print(progress._table([row, row | {"step": 130.0}], width))
        assert isinstance(console.file, StringIO)
        head, *_, last = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
        assert head == list(row)[: len(head)] and last[0] == "130" and len(last) == len(head)
        assert len(head) == {40: 3, 60: 5, 79: 6, 80: 7}[width]
