from __future__ import annotations

import os

import pytest

from flashgen.cli import app
from flashgen.device.engine import default_threads
from flashgen.runtime.memory import cpu_count
from flashgen.runtime.processes import rank, world_size
from tests.cli.command import flashgen, refused


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("2,1", 2), (" 2 ", 2), ("", None), (" ", None), ("0", None)])
def test_threads_are_the_first_number_of_the_variable(text: str, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert default_threads() == threads or (threads is None and default_threads() == cpu_count())
    assert "Usage" in flashgen("show", "--help").stdout and "no artifact" in flashgen("show", "none").stderr


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OMP_NUM_THREADS", "abc"), ("OMP_NUM_THREADS", "2.5"), ("OMP_NUM_THREADS", "-1"), ("OMP_NUM_THREADS", "9" * 5000),
        ("OMP_NUM_THREADS", "²"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "4"), ("LOCAL_RANK", "x"),
    ],
)  # fmt: skip
def test_a_variable_without_a_number_is_named(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "RANK" in variable:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(variable, text)
    assert f"the environment variable {variable} is {text!r}; set it to a number from " in refused(2, "show", "shapes")


def test_rank_without_a_number_of_processes_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "none")
    assert (world_size(), rank()) == (1, 0)
    assert "no artifact" in flashgen("show", "none").stderr


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("", "1"), ("2,1", "2,1")])
def test_torch_gets_as_many_threads_as_the_quota_has_processors(given: str | None, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP knows the affinity, but no quota."""
    monkeypatch.setattr(app, "cpu_count", lambda: 1)
    monkeypatch.setattr(app, "app", lambda **_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    app.main()
    assert os.environ["OMP_NUM_THREADS"] == threads
