"""flashgen quantize"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE)
def quantize(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    options: Options,
    budget: Annotated[str | None, typer.Option("--budget", metavar="BITS|BYTES", help="4.25 or 900MB: bits by measured damage")] = None,
) -> None:
    """Quantize the transformer to INT4."""
    if budget is not None:
        options = replace(options, set=[*(options.set or []), f"quantize.budget={budget}"])
    run_stage(options, "quantize", {"student": student})
