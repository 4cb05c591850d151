"""flashgen finetune"""

from __future__ import annotations

from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE, "judge", "on")
def finetune(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    options: Options,
) -> None:
    """Fine-tune split-timestep branches and merge them into one checkpoint."""
    run_stage(options, "finetune.Finetune", {"student": student})
