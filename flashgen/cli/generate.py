"""flashgen generate"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import device_for, emit, record_of


@command("seed", "device")
def generate(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="any artifact: diffusers layout or exported")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="what to paint")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.png", help="several prompts get numbered files")],
    options: Options,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="as trained by default")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", metavar="W", min=1, help="of a teacher; students need none")] = None,
    size: Annotated[int | None, typer.Option("--size", metavar="PX", min=1, help="as trained by default")] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="PROMPT", help="needs guidance above 1")] = None,
) -> None:
    """Paint pictures."""
    started = time.perf_counter()
    from flashgen.artifact.store import open_artifact
    from flashgen.stages.generate import run

    extra = device_for(options, run, inspect.signature(run).parameters)
    images = run(artifact, prompts, out, seed=options.seed, steps=steps, guidance=guidance, size_px=size, negative=negative, **extra)
    record = {**record_of(open_artifact(artifact), "generate", started, {}), "images": [str(image) for image in images]}
    emit(options, "\n".join(record["images"]), record)
