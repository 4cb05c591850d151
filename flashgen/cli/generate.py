"""flashgen generate"""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import check_device, emit, record_of
from flashgen.errors import UsageError


@command("seed", "device")
def generate(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="any artifact: diffusers layout or exported")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.png", help="several pictures get numbered files")],
    options: Options,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="what to paint")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="FILE", help="a prompt a line, after those given")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="1,5-9", help="every prompt with each, instead of --seed")] = None,
    from_png: Annotated[Path | None, typer.Option("--from-png", metavar="FILE", help="the picture that this file says it is")] = None,
    init_image: Annotated[Path | None, typer.Option("--init-image", metavar="FILE", help="start from it instead of noise")] = None,
    strength: Annotated[float, typer.Option("--strength", metavar="S", min=0, max=1, help="of the noise on --init-image")] = 0.8,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="as trained by default")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", metavar="W", min=1, help="of a teacher; students need none")] = None,
    size: Annotated[int | None, typer.Option("--size", metavar="PX", min=1, help="as trained by default")] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="PROMPT", help="needs guidance above 1")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="pictures at a time")] = 8,
    grid: Annotated[bool, typer.Option("--grid", help="also a contact sheet of all of them, FILE-grid.png")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="FILE-preview.png at every step: what it would become")] = False,
    memory: Annotated[str | None, typer.Option("--memory", metavar="2GB", help="for exported artifacts: stay within it")] = None,
    engine: Annotated[
        Literal["auto", "onnxruntime", "openvino"], typer.Option("--engine", help="of exported artifacts; auto: the fastest here")
    ] = "auto",
) -> None:
    """Paint pictures."""
    started = time.perf_counter()
    check_device(options)
    from flashgen.artifact.store import open_artifact
    from flashgen.stages.prompts import read_prompts

    stage = import_module("flashgen.stages.generate")
    if not prompts and not prompt_file and not from_png:
        raise UsageError("PROMPT... is missing: say what to paint, or give --prompt-file or --from-png")
    asked: dict[str, Any] = {"seed": options.seed, "steps": steps, "guidance": guidance, "negative": negative, "size_px": size}
    given = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    if from_png:
        given, asked = stage.again(from_png, artifact, given, asked | {"seeds": seeds})
    elif seeds is not None:
        asked["seeds"] = stage.read_seeds(seeds)
    images = stage.run(
        artifact, given, out, **asked, batch=batch, init_image=init_image, strength=strength, contact_sheet=grid,
        preview=preview, engine=engine, memory=memory,
    )  # fmt: skip
    record = {**record_of(open_artifact(artifact), "generate", started, {}), "images": [str(image) for image in images]}
    emit(options, "\n".join(record["images"]), record)
