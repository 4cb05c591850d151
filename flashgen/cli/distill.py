"""flashgen distill"""

from __future__ import annotations

from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE, "judge", "on")
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="`shapes`, an artifact, a diffusers folder or hf:OWNER/NAME")],
    options: Options,
) -> None:
    """Distil a few-step student: trajectory guidance, then distribution matching."""
    from flashgen.stages.teacher import open_teacher

    ref = teacher if options.plan else str(open_teacher(teacher, options.out).path)  # a plan starts nothing, not even an import
    run_stage(options, "distill.Distill", {"teacher": ref})
