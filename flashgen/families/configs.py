"""Configs of the components of a diffusers-layout folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from flashgen.errors import ArtifactError

Configs = Callable[[str], Mapping[str, Any]]  # of a component by its name


def configs_in(folder: Path) -> Configs:
    """Configs of the components in a diffusers-layout folder, each file read once."""
    return cache(partial(read_config, folder))


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """config.json of a component. Raises ArtifactError when it is missing or broken."""
    file = folder / component / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); take the artifact from its source again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} is not a mapping; take the artifact from its source again")
    return config
