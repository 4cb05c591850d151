"""Numbers in environment variables: of threads, and of processes, as `accelerate launch` and `torchrun` set them."""

from __future__ import annotations

import os
import re

from flashgen.errors import UsageError

MOST = 1 << 12  # threads or processes


def number(name: str) -> int | None:
    """Number that an environment variable holds, of a list as in `4,2` the first; None where it is unset, empty or no number."""
    first = os.environ.get(name, "").partition(",")[0].strip()
    return int(first) if re.fullmatch("[0-9]{1,9}", first) else None


def check_environment() -> None:
    """Raises UsageError for a variable that is set to something else than a number, or to one out of range."""
    _check("OMP_NUM_THREADS", 0, MOST)  # 0: as many as there are processors
    _check("WORLD_SIZE", 1, MOST)
    if (processes := number("WORLD_SIZE") or 1) > 1:
        _check("RANK", 0, processes - 1)
        _check("LOCAL_RANK", 0, processes - 1)


def _check(name: str, least: int, most: int) -> None:
    text, found = os.environ.get(name, ""), number(name)
    if text.strip() and (found is None or not least <= found <= most):
        raise UsageError(f"the environment variable {name} is {text!r}; set it to a number from {least} to {most}, or unset it")
