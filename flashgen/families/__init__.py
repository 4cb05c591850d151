"""Model families by name. `sd3` is built in; a package adds its own through an entry point of the group `flashgen.families`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from flashgen.errors import ArtifactError

if TYPE_CHECKING:
    from flashgen.families.base import Family

BUILT_IN = {"sd3": "flashgen.families.sd3:SD3"}
GROUP = "flashgen.families"


def names() -> list[str]:
    """Names of all families that are installed."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


@cache
def get(name: str) -> Family:
    """The family called `name`. Raises ArtifactError when no installed package has it."""
    target = BUILT_IN.get(name) or next((point.value for point in entry_points(group=GROUP) if point.name == name), None)
    if target is None:
        known = ", ".join(names())
        raise ArtifactError(f"model family {name!r} is not known here (known: {known}); install the package or the flashgen that brings it")
    module, _, attribute = target.partition(":")
    family: Family = getattr(import_module(module), attribute)()
    return family


def of_pipeline(class_name: str) -> Family | None:
    """The family whose diffusers pipeline is `class_name`, or None."""
    return next((family for family in map(get, names()) if family.pipeline_class == class_name), None)
