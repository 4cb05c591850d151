"""`make mutations` in short, and its classes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.mutations import Outcome, classify


def test_no_damage_is_drawn_published_or_a_bug(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.mutations", str(tmp_path), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("detected") > 5


def test_what_is_not_allowed_is_told_apart() -> None:
    from benchmarks.mutation_targets import Target

    target = Target("a", 1, Path.mkdir, Path.read_bytes)
    whole = Outcome(0, "", "same", 1.0, 300.0)
    found = [
        classify(replace(whole, **change), whole, target, made_again)
        for change, made_again in (
            ({}, False),
            ({}, True),
            ({"code": 3, "text": "warning: a\nerror: b\n"}, False),
            ({"result": "other"}, False),
            ({"code": 1, "text": "error: unexpected"}, False),
            ({"code": 3, "text": "error: a\nerror: b"}, False),
            ({"code": -11, "text": "no answer"}, False),
            ({"code": -9, "text": "hang"}, False),
            ({"mib": 601.0}, False),
        )
    ]
    assert found == ["harmless", "regenerated", "detected", "HARMFUL", "TRACE", "TRACE", "TRACE", "HANG", "MEMORY"]
    assert classify(replace(whole, result="other"), whole, replace(target, is_vouched=False), False) == "followed"
