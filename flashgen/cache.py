"""What flashgen keeps for the user between runs, all of which can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_path(name: str) -> Path:
    """~/.cache/flashgen/`name`, or below XDG_CACHE_HOME where that is set; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashgen" / name
