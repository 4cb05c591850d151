from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from flashgen.cache import cache_path, remember


def test_cache_is_below_xdg_cache_home_or_the_systems_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("npm") == tmp_path / "flashgen" / "npm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = cache_path("npm")
    assert found.is_relative_to(tmp_path) and found.parts[-2:] == ("flashgen", "npm")


def test_user_without_a_home_has_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is without HOME and without an entry in the user database
    file = cache_path("engines.json")
    assert file.is_absolute()
    assert isinstance(remember(file, "x"), OSError) and not file.exists()


def test_remember_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    for text in ("one", "two"):
        assert remember(tmp_path / "a" / "b.json", text) is None
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("b.json", "two")]
    (tmp_path / "file").write_text("")
    assert isinstance(remember(tmp_path / "file" / "b.json", "x"), OSError)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    assert remember(tmp_path / "b.json", "one") is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert isinstance(remember(tmp_path / "b.json", "two" * 10_000), OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b.json", "one")]
