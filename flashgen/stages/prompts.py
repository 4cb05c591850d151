"""Prompts from a file: of generate, and of the stages that train or calibrate."""

from __future__ import annotations

from pathlib import Path

from flashgen.artifact.files import sha256
from flashgen.errors import UsageError
from flashgen.recipe.schema import Recipe


def read_prompts(path: Path, option: str = "--prompt-file ") -> list[str]:
    """A prompt a line; empty lines do not count. Raises UsageError when there is none."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}{path} cannot be read as text ({error})") from error
    if not found:
        raise UsageError(f"{option}{path} has no prompts; write one a line")
    return found


def own_prompts(recipe: Recipe) -> list[str] | None:
    """Those of the recipe's `prompts_file`; None without one: the shapes world's."""
    return None if recipe.prompts_file is None else read_prompts(recipe.prompts_file, "prompts_file=")


def prompts_key(recipe: Recipe) -> dict[str, object]:
    """What the result of a stage depends on besides its own section, for `begin`."""
    return {} if own_prompts(recipe) is None or recipe.prompts_file is None else {"prompts_file": sha256(recipe.prompts_file)}
