"""Worlds by name: prompts with an exact judge. `shapes` is the embedded one."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from flashgen.errors import ArtifactError

if TYPE_CHECKING:
    from flashgen.worlds.base import World

NAMES = ("shapes",)


@cache
def get(name: str) -> World:
    """The world called `name`. Raises ArtifactError for a name that this flashgen does not know."""
    if name != "shapes":
        raise ArtifactError(f"world {name!r} is not known here (known: {', '.join(NAMES)}); install the flashgen that brings it")
    from flashgen.worlds.shapes import Shapes

    return Shapes()
