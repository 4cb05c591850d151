"""Lines of progress where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

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
