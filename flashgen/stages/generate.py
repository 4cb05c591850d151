"""generate: pictures from any artifact; torch for diffusers layouts, an engine without torch for exported ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.store import Artifact
from flashgen.errors import MachineError, UsageError
from flashgen.png import sheet, texts, write_png
from flashgen.progress import say
from flashgen.stages.request import Request


def generate(
    source: Artifact,
    request: Request,
    out: Path,
    *,
    batch: int = 8,
    grid_columns: int | None = None,
    preview: bool = False,
    engine: str = "auto",
    memory: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Draw a request and return the PNG files: `out` for one picture; out-1.png, out-2.png, ... beside it for several.

    `grid_columns` adds out-grid.png with that many columns (0: about square). `preview` writes out-preview.png at every step: the first
    picture as it would become. `memory`, as in 2GB, bounds what an exported artifact may use; torch draws all others on `device`. The text
    chunks of every file say how to draw it again. Raises UsageError, before any network is loaded, for what the artifact cannot do.
    """
    sampler = request.check(source)
    weight, sigmas = request.weight(sampler), request.sigmas(sampler)
    init = request.init(source, sampler)
    wanted = {"preview": preview, "grid": grid_columns is not None}
    beside = {name: out.with_stem(f"{out.stem}-{name}") for name, is_wanted in wanted.items() if is_wanted}
    files = _outputs(out, len(request.prompts), [*beside.values()])
    options: dict[str, Any] = {"guidance": weight, "sigmas": sigmas, "negative": request.negative, "batch": batch, "init": init}
    if preview:
        options["preview"] = _preview(beside["preview"])
    if source.manifest.kind == "device":
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device} is for artifacts in diffusers layout; exported ones run on an engine, see --engine")
        images = _on_device(source, request, engine, memory, options)
    else:
        for name, given in {"--engine": engine != "auto", "--memory": memory is not None}.items():
            if given:
                raise UsageError(f"{name} is for exported artifacts; {source.path} is drawn by torch, leave {name} out, or export it first")
        from flashgen.models.pipeline import load_pipeline
        from flashgen.models.sample import sample
        from flashgen.runtime.accelerator import device_of, drawing_dtype

        where = device_of(device)
        images = sample(
            load_pipeline(source.path, drawing_dtype(where), device=where),
            sampler,
            request.prompts,
            request.seeds,
            size_px=request.size,
            **options,
        )
    chunks: dict[str, Any] = {"guidance": weight, "negative": request.negative} if weight != 1 else {}
    if request.init_image:
        chunks |= {"init_image": request.init_image.name, "strength": request.strength}
    for path, image, prompt, seed in zip(files, images, request.prompts, request.seeds, strict=True):
        write_png(path, image, texts(prompt, seed, sigmas, source.manifest.digest, **chunks))
    if grid_columns is not None:
        write_png(beside["grid"], sheet(images, columns=grid_columns), {})
    return files


def _on_device(source: Artifact, request: Request, engine: str, memory: str | None, options: dict[str, Any]) -> NDArray[np.uint8]:
    from flashgen.device.choice import choose, installed
    from flashgen.device.memory import plan
    from flashgen.device.sampler import DevicePipeline
    from flashgen.runtime.memory import parse_bytes

    budget, count = None if memory is None else parse_bytes(memory), len(request.prompts)
    names, plans = installed() if engine == "auto" else [engine], {}
    costs = {"guided": options["guidance"] != 1, "preview": "preview" in options, "init": options["init"] is not None}
    for name in names if budget is not None else ():
        try:
            plans[name] = plan(source, name, count, options["batch"], budget, **costs)
        except MachineError:
            if not plans and name == names[-1]:
                raise
    chosen = choose(source, count * (len(options["sigmas"]) - 1), [*plans] or names)
    if plans:
        say(f"memory: {plans[chosen]}")
    pipeline = DevicePipeline(source, engine=chosen, falls_back=engine == "auto")
    return pipeline.sample(request.prompts, request.seeds, within=plans.get(chosen), **options)


def _preview(path: Path) -> Callable[[int, Callable[[], NDArray[np.uint8]]], None]:
    say(f"preview: {path}, the first picture of a batch as it would become")
    return lambda step, picture: write_png(path, picture(), {"step": str(step + 1)})


def _outputs(out: Path, count: int, beside: list[Path]) -> list[Path]:
    """The pictures' files. Raises UsageError when one of them, or of those `beside` them, cannot be written."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"--out {out} is not a .png file name; write for instance -o {out.with_suffix('.png') if out.name else 'a.png'}")
    files = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}: {out.parent}; name a folder that can be written to") from error
    blocked = next((p for p in (*files, *beside) if p.is_dir() or not os.access(p if p.exists() else p.parent, os.W_OK)), None)
    if blocked:
        raise UsageError(f"--out {blocked} cannot be written; name another file, or mend its permissions")
    if count > 1:
        say(f"{count} pictures, so the files are {files[0].name} to {files[-1].name}")
    return files
