"""Files that flashgen keeps for the user between runs. All of them can be made again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path


def cache_path(name: str) -> Path:
    """`name` in the user's cache folder: XDG_CACHE_HOME/flashgen where that is set, else the system's usual place (~/.cache/flashgen).

    The path need not exist. For a user without a home folder it can never exist, so that reading and `remember` fail as for a full disk.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root, "flashgen") if root else user_cache_path("flashgen", appauthor=False)
    except RuntimeError:
        folder = Path()
    return (folder if root or folder.is_absolute() else Path(os.devnull, "flashgen")) / name


def remember(file: Path, text: str) -> OSError | None:
    """Write `text` to `file` completely or not at all; returns the error if it fails, since no work depends on a cache."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        return error
    return None
