"""flashgen bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import choice_of, emit


@command("recipe", "set", "seed", "device")
def bench(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT...", help="any artifacts; `shapes` is the embedded teacher")],
    options: Options,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="folder for the report")] = None,
    per_task: Annotated[int | None, typer.Option("--per-task", metavar="N", min=1, help="prompts per task")] = None,
    engine: Annotated[Literal["onnxruntime", "openvino"], typer.Option("--engine", help="of exported artifacts")] = "onnxruntime",
) -> None:
    """Measure latency, memory, size and quality."""
    from flashgen.stages import bench as stage

    opened = stage.open_all(artifacts)
    recipe = choice_of(options).resolve(opened[0])
    report = stage.bench(artifacts, opened, out, recipe, options.seed, per_task, engine, options.device)
    if options.json or out:
        emit(options, str(out), report)
