"""flashgen export"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage


@command(*STAGE)
def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="an artifact folder, DIR@v0001, or a version")],
    options: Options,
    target: Annotated[Literal["onnx", "gguf", "web"], typer.Option("--target", help="runtime to export for")] = "onnx",
) -> None:
    """Export for devices, each component checked against torch."""
    run_stage(options, "export", {"student": student}, target=target)
