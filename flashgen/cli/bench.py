"""flashgen bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import check_device, emit, recipe_of


@command("recipe", "set", "seed", "device")
def bench(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT...", help="any artifacts; `shapes` is the embedded teacher")],
    options: Options,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="folder for the report")] = None,
    per_task: Annotated[int | None, typer.Option("--per-task", metavar="N", min=1, help="prompts of each task")] = None,
) -> None:
    """Measure latency, memory, size and quality."""
    check_device(options)
    recipe = recipe_of(options)
    from flashgen.stages.bench import run

    report = run(artifacts, out, recipe, options.seed, per_task)
    if options.json or out:
        emit(options, str(out), report)
