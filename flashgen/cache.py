"""What flashgen keeps for the user between runs, all of which can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path(name: str) -> Path:
    """~/.cache/flashgen/`name`, or below XDG_CACHE_HOME where that is set; it need not exist, and cannot where a user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashgen" / name
    except RuntimeError:
        return Path(os.devnull, "flashgen", name)


def remember(file: Path, text: str) -> OSError | None:
    """Write `file` whole or not at all; what went wrong is returned, since nobody's work fails for a cache."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError as error:
        return error
    return None
