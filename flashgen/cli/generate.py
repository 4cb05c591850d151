"""flashgen generate"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import emit, record_of
from flashgen.errors import UsageError

if TYPE_CHECKING:
    from flashgen.artifact.store import Artifact
    from flashgen.stages.request import Request


@command("seed", "device")
def generate(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="any artifact: diffusers layout or exported")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.png|DIR", help="several get numbered files; a folder is resumed")],
    options: Options,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="what to draw")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="FILE", help="more prompts, one per line")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="1,5-9", help="every prompt with each, instead of --seed")] = None,
    from_png: Annotated[Path | None, typer.Option("--from-png", metavar="FILE", help="draw a picture of flashgen again")] = None,
    init_image: Annotated[Path | None, typer.Option("--init-image", metavar="FILE", help="start from it instead of noise")] = None,
    strength: Annotated[float, typer.Option("--strength", metavar="S", min=0, max=1, help="noise added to --init-image")] = 0.8,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="[TRAINING/]STEP", help="of the run that writes ARTIFACT")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="default: as trained")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", metavar="W", min=1, help="for teachers; students need none")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="PX|WxH", help="512 or 768x512; default: as trained")] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="PROMPT", help="needs guidance above 1")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="pictures at a time")] = 8,
    grid: Annotated[bool, typer.Option("--grid", help="also a contact sheet of all pictures, FILE-grid.png")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="FILE-preview.png at every step: the picture so far")] = False,
    memory: Annotated[str | None, typer.Option("--memory", metavar="2GB", help="limit, for exported artifacts")] = None,
    engine: Annotated[
        str,
        typer.Option("--engine", metavar="auto|NAME[:DEVICE]", help="onnxruntime or openvino, for exported artifacts; auto: the fastest"),
    ] = "auto",
) -> None:
    """Draw pictures."""
    started = time.perf_counter()
    from flashgen.stages import generate as stage
    from flashgen.stages.checkpoints import open_checkpoint
    from flashgen.stages.inputs import open_input
    from flashgen.stages.prompts import read_prompts
    from flashgen.stages.request import Request, option_size, read_seeds

    if not prompts and not prompt_file and not from_png:
        raise UsageError("PROMPT... is missing: say what to draw, or give --prompt-file or --from-png")
    source = open_checkpoint(Path(artifact), checkpoint) if checkpoint else open_input(artifact)
    every = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    columns = 0
    if from_png:
        if every or seeds is not None or any((options.seed, steps, guidance, negative, size)):
            raise UsageError("--from-png brings prompt, seed, steps, guidance, negative and size with it; leave those out")
        request = _again(from_png, source, init_image, strength)
    else:
        numbers = None if seeds is None else read_seeds(seeds)
        pairs = [(p, s) for p in every for s in numbers] if numbers else [(p, options.seed + i) for i, p in enumerate(every)]
        columns = len(numbers or [])
        request = Request(
            [prompt for prompt, _ in pairs], [seed for _, seed in pairs], steps, guidance, option_size(size), negative or "", init_image,
            strength,
        )  # fmt: skip
    images = stage.generate(
        source, request, out, batch=batch, grid_columns=columns if grid else None, preview=preview, engine=engine, memory=memory,
        device=options.device,
    )  # fmt: skip
    record = {**record_of(source, "generate", started, {}), "images": [str(image) for image in images]}
    emit(options, "\n".join(record["images"]) if out.suffix else str(out), record)


def _again(png: Path, source: Artifact, init_image: Path | None, strength: float) -> Request:
    from dataclasses import replace

    from flashgen.stages.request import request_of_png

    return replace(request_of_png(png, source), init_image=init_image, strength=strength)
