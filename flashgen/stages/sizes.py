"""Picture sizes that a family's networks can draw."""

from __future__ import annotations

from flashgen.artifact.manifest import Sampler
from flashgen.errors import UsageError
from flashgen.families.base import Family
from flashgen.families.configs import Configs
from flashgen.pixels import Size
from flashgen.progress import warn


def check_size(family: Family, configs: Configs, sampler: Sampler, size: Size, option: str) -> None:
    """Raises UsageError for a size that the networks cannot draw, and warns of a size at which `sampler`'s artifact was not trained.

    `option` precedes the size in messages, as in `--size ` or `export.size_px=`.
    """
    unit, largest = family.size_limits(configs)
    if any(side % unit or not unit <= side <= largest for side in size):
        raise UsageError(
            f"{option}{size}: this model draws sides that are multiples of {unit} px up to {largest}; it was trained at {sampler.size_px}, "
            f"so {option}{sampler.size_px} works"
        )
    if size != sampler.size_px:
        warn(f"trained at {sampler.size_px} px; at {size} px expect worse pictures")
