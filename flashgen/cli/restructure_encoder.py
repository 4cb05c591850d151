"""flashgen restructure-encoder"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE, "judge", "on")
def restructure_encoder(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    mode: Annotated[
        Literal["zeros", "prune", "compact", "decoder"],
        typer.Option("--mode", help="what replaces the large text encoder, or decoder: a tiny decoder for the VAE's"),
    ],
    options: Options,
) -> None:
    """Make the student run without its large text encoder (SD3: T5-XXL), or with a tiny decoder."""
    if mode == "decoder":
        run_stage(options, "decoder.TrainDecoder", {"student": student})
        return
    run_stage(options, "restructure.RestructureEncoder", {"student": student}, mode=mode)
