"""flashgen quantize"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE, "judge", "on")
def quantize(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    options: Options,
    scheme: Annotated[Literal["groups", "nf4"] | None, typer.Option("--scheme", help="nf4: bitsandbytes', for diffusers")] = None,
    budget: Annotated[str | None, typer.Option("--budget", metavar="BITS|BYTES", help="4.25 or 900MB: bits by measured damage")] = None,
) -> None:
    """Quantize the transformer to INT4."""
    given = {"budget": budget, "scheme": scheme}
    overrides = [f"quantize.{name}={value}" for name, value in given.items() if value is not None]
    options = replace(options, set=[*(options.set or []), *overrides])
    run_stage(options, "quantize.Quantize", {"student": student})
