"""generate: pictures from any artifact; torch for diffusers layouts, an engine without torch for exported ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.files import locked, remove_temporaries, write_whole
from flashgen.artifact.store import Artifact
from flashgen.device.tokens import counted_cuts
from flashgen.errors import MachineError, UsageError
from flashgen.pixels import slices
from flashgen.png import is_whole, sheet, texts, write_png
from flashgen.progress import say, track
from flashgen.stages.checkpoints import StudentCheckpoint
from flashgen.stages.inputs import sampler_of
from flashgen.stages.request import Request

Draw = Callable[[list[str], list[int]], NDArray[np.uint8]]


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

    An `out` without a suffix is a folder: pictures are written there batch by batch, and those that an earlier run has written are left.
    `grid_columns` adds out-grid.png with that many columns (0: about square). `preview` writes out-preview.png at every step: the first
    picture as it would become. `memory`, as in 2GB, bounds what an exported artifact may use; torch draws all others on `device`. The text
    chunks of every file say how to draw it again. Raises UsageError, before any network is loaded, for what the artifact cannot do.
    """
    sampler = request.check(source)
    weight, sigmas = request.weight(sampler), request.sigmas(sampler)
    options: dict[str, Any] = {"guidance": weight, "sigmas": sigmas, "negative": request.negative, "batch": batch}
    options["init"] = request.init(source, sampler)
    chunks: dict[str, Any] = {"guidance": weight, "negative": request.negative} if weight != 1 else {}
    if "decoder" in source.manifest.extra:
        chunks["decoder"] = source.manifest.extra["decoder"]
    if request.init_image:
        chunks |= {"init_image": request.init_image.name, "strength": request.strength}

    def write(path: Path, image: NDArray[np.uint8], prompt: str, seed: int) -> None:
        write_png(path, image, texts(prompt, seed, sigmas, source.manifest.digest, **chunks))

    wanted = {"preview": preview, "grid": grid_columns is not None}
    if not out.suffix:
        if given := [name for name, is_wanted in wanted.items() if is_wanted]:
            raise UsageError(f"--{given[0]} is for pictures beside a file; give --out FILE.png, or leave it out")
        settings = {"artifact": source.manifest.digest, "sigmas": sigmas, "size": str(request.size), **chunks}
        with ExitStack() as stack:
            stack.enter_context(counted_cuts())
            files = _begin_folder(out, request, settings, stack)
            missing = [index for index, path in enumerate(files) if not is_whole(path)]
            parts = slices(len(missing), batch)
            draw = _drawer(source, request, engine, memory, device, options, len(missing), batch) if parts else None
            for part in track(parts, "pictures", total=len(parts)):
                assert draw is not None
                prompts, seeds = [request.prompts[i] for i in missing[part]], [request.seeds[i] for i in missing[part]]
                for index, image in zip(missing[part], draw(prompts, seeds), strict=True):
                    write(files[index], image, request.prompts[index], request.seeds[index])
        return files
    beside = {name: out.with_stem(f"{out.stem}-{name}") for name, is_wanted in wanted.items() if is_wanted}
    files = _outputs(out, len(request.prompts), [*beside.values()])
    if preview:
        options["preview"] = _preview(beside["preview"])
    with counted_cuts():
        images = _drawer(source, request, engine, memory, device, options, len(files), len(files))(request.prompts, request.seeds)
    for path, image, prompt, seed in zip(files, images, request.prompts, request.seeds, strict=True):
        write(path, image, prompt, seed)
    if grid_columns is not None:
        write_png(beside["grid"], sheet(images, columns=grid_columns), {})
    return files


def _begin_folder(out: Path, request: Request, settings: dict[str, Any], lock: ExitStack) -> list[Path]:
    """The files of a folder of pictures, after pictures.jsonl, which says what they are; `lock` holds the folder's lock.

    Raises UsageError if the folder holds other pictures, and MachineError if another process draws into it.
    """
    files = [out / f"{index:06d}.png" for index in range(len(request.prompts))]
    rows = [{"file": f.name, "prompt": p, "seed": s} for f, p, s in zip(files, request.prompts, request.seeds, strict=True)]
    text, listing = "".join(json.dumps(row) + "\n" for row in [settings, *rows]), out / "pictures.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(out))
        remove_temporaries(out)
        if not listing.exists():
            if any(out.glob("*.png")):
                raise UsageError(f"--out {out} holds pictures and no pictures.jsonl that says which; name another folder")
            write_whole(listing, text.encode())
        elif listing.read_bytes() != text.encode():
            raise UsageError(f"--out {out} holds pictures of another artifact, or of other prompts, seeds or settings; name another folder")
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error
    return files


def _drawer(
    source: Artifact,
    request: Request,
    engine: str,
    memory: str | None,
    device: str,
    options: dict[str, Any],
    count: int,
    together: int,
) -> Draw:
    """A function that draws (prompts, seeds) as pictures [B, H, W, 3]; `count` pictures in all, at most `together` per call."""
    if source.manifest.kind == "device":
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device} is for artifacts in diffusers layout; exported ones run on an engine, see --engine")
        return _on_device(source, engine, memory, options, count, min(count, together))
    for name, given in {"--engine": engine != "auto", "--memory": memory is not None}.items():
        if given:
            raise UsageError(f"{name} is for exported artifacts; {source.path} is drawn by torch, leave {name} out, or export it first")
    from flashgen.models.pipeline import load_pipeline
    from flashgen.models.sample import sample
    from flashgen.runtime.accelerator import device_of, drawing_dtype

    where = device_of(device)
    pipe, sampler = load_pipeline(source.path, drawing_dtype(where), device=where), sampler_of(source)
    if isinstance(source, StudentCheckpoint):
        source.load_into(pipe)
    return lambda prompts, seeds: sample(pipe, sampler, prompts, seeds, size_px=request.size, **options)


def _on_device(source: Artifact, engine: str, memory: str | None, options: dict[str, Any], count: int, together: int) -> Draw:
    from flashgen.device.choice import choose, installed, learn
    from flashgen.device.memory import plan
    from flashgen.device.providers import Choice
    from flashgen.device.sampler import DevicePipeline
    from flashgen.runtime.memory import parse_bytes

    budget = None if memory is None else parse_bytes(memory)
    names, plans = installed(source) if engine == "auto" else [engine], {}
    costs = {"guided": options["guidance"] != 1, "preview": "preview" in options, "init": options["init"] is not None}
    for name in names if budget is not None else ():
        try:
            plans[name] = plan(source, name, together, options["batch"], budget, **costs)
        except MachineError:
            if not plans and name == names[-1]:
                raise
    steps = count * (len(options["sigmas"]) - 1) * (2 if costs["guided"] else 1)
    choice = choose(source, steps, [*plans] or names) if engine == "auto" else Choice(engine)
    if plans:
        say(f"memory: {plans[choice.name]}")
    pipeline = DevicePipeline(source, engine=replace(choice, compact=budget is not None))

    def draw(prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        images = pipeline.sample(prompts, seeds, within=plans.get(choice.name), **options)
        learn(source, pipeline.engine.spent)
        pipeline.engine.spent.clear()
        return images

    return draw


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
