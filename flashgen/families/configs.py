"""Configs of the components of a diffusers-layout folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flashgen.artifact.files import SOURCE, read_json
from flashgen.errors import ArtifactError

if TYPE_CHECKING:
    from flashgen.families.base import Family

Configs = Callable[[str], Mapping[str, Any]]  # of a component by its name


class Config(BaseModel):
    """Base of the schemas in `Family.schemas`: the fields that decide sizes, with bounds. Other fields are the network's own to read."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


def configs_in(folder: Path, family: Family) -> Configs:
    """Configs of the components in a diffusers-layout folder, each file read once and checked by the family's schema."""
    return cache(lambda component: read_config(folder, component, family.schemas.get(component)))


def read_config(folder: Path, component: str, schema: type[Config] | None = None) -> dict[str, Any]:
    """config.json of a component, with the defaults of `schema`. Raises ArtifactError when it is missing, broken or out of bounds."""
    file = folder / component / "config.json"
    config = read_json(file)
    if schema is None:
        return config
    try:
        checked = schema.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where, why = ".".join(map(str, first["loc"])) or "config", first["msg"].removeprefix("Value error, ")
        raise ArtifactError(f"{file}: {where}: {why}; {SOURCE}") from error
    return {**{name: getattr(checked, name) for name in schema.model_fields}, **config}
