"""flashgen distill"""

from __future__ import annotations

from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE)
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="`shapes`, an artifact, a diffusers folder or a hub id")],
    options: Options,
) -> None:
    """Distil a few-step student: trajectory guidance, then distribution matching."""
    run_stage(options, "distill", {"teacher": teacher})
