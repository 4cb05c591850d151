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
    offline: Annotated[bool, typer.Option("--offline", help="with --target web: take its libraries from the cache only")] = False,
) -> None:
    """Export for devices, each component checked against torch; --target web adds a page that draws in the browser."""
    run_stage(options, "export.Export", {"student": student}, target=target, offline=offline)
