"""flashgen quantize"""

from __future__ import annotations

from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE)
def quantize(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    options: Options,
) -> None:
    """Quantize the transformer to INT4."""
    run_stage(options, "quantize", {"student": student})
