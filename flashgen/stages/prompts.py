"""Prompts from text files."""

from __future__ import annotations

from pathlib import Path

from flashgen.errors import UsageError

UNJUDGED_PICTURES = 8  # prompts that are drawn where no judge scores pictures


def read_prompts(path: Path, option: str = "--prompt-file ") -> list[str]:
    """The prompts of a file, one per line; empty lines are skipped. Raises UsageError when there is none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}{path} cannot be read as text ({error})") from error
    if not prompts:
        raise UsageError(f"{option}{path} has no prompts; write one per line")
    return prompts
