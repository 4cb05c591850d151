"""A short form of the crash matrix: `make crash-test` runs all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")
def test_kills_and_full_disks_lose_nothing(tmp_path: Path) -> None:
    """In a process of its own, for its children are forks: they must not have the threads of other tests."""
    command = [sys.executable, "-m", "benchmarks.crash", str(tmp_path), "--short", "--page", str(tmp_path / "page.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    faults = Counter[str]()
    for row in json.loads((tmp_path / "page.json").read_text())["rows"]:
        faults[row["kind"]] += row["faults"]
        assert row["failures"] == []
    assert faults["kill"] >= 5 and faults["file limit"] >= 3 and faults["publish"] >= 10
