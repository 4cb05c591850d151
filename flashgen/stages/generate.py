"""generate: pictures from any artifact; torch for diffusers layouts, onnxruntime alone for exported ones."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device.png import read_texts, sheet, texts, write_png
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.flow.grid import shifted_grid
from flashgen.progress import say, warn
from flashgen.stages.checks import check_size

MOST_SEEDS = 10_000


def run(
    artifact: str,
    prompts: list[str],
    out: Path,
    *,
    seed: int = 0,
    seeds: list[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size_px: int | None = None,
    negative: str | None = None,
    batch: int = 8,
    init_image: Path | None = None,
    strength: float = 0.8,
    contact_sheet: bool = False,
    preview: bool = False,
    engine: str = "auto",
    memory: str | None = None,
) -> list[Path]:
    """Draw `prompts` and return the PNG files: `out` for one picture, out-1.png, out-2.png, ... beside it for several.

    Prompt i is drawn from seed + i, or every prompt from each of `seeds`. `init_image` is noised to the first sigma that is not above
    `strength` and goes on from there (SDEdit). `preview` writes out-preview.png at every step: the first picture as it would become.
    `memory` is what an exported artifact may use, as in 2GB.

    Every file's text chunks say how to draw it again. Raises UsageError, before any
    network is loaded, for what the artifact cannot do.
    """
    source = open_artifact(artifact)
    pairs = [(p, s) for p in prompts for s in seeds] if seeds else [(p, seed + i) for i, p in enumerate(prompts)]
    prompts, drawn = [p for p, _ in pairs], [s for _, s in pairs]
    sampler = check_request(source, prompts, drawn, steps, guidance, size_px, negative)
    weight = sampler.guidance if guidance is None else guidance
    sigmas = sampler.sigmas if steps is None or steps == len(sampler.sigmas) - 1 else shifted_grid(steps, sampler.shift)
    options: dict[str, Any] = {"guidance": weight, "sigmas": sigmas, "negative": negative or "", "batch": batch}
    if init_image:
        options |= _start(source, init_image, strength, sigmas, size_px or sampler.size_px)
        sigmas = options["sigmas"]
    beside = {name: out.with_stem(f"{out.stem}-{name}") for name, wanted in (("preview", preview), ("grid", contact_sheet)) if wanted}
    files = _outputs(out, len(prompts), [*beside.values()])
    if preview:
        options["preview"] = _preview(beside["preview"])
    if source.manifest.kind == "device":
        images = _on_device(source, prompts, drawn, engine, memory, options)
    else:
        from flashgen.models.sample import load_pipeline, sample

        for name, given in {"--engine": engine != "auto", "--memory": memory is not None}.items():
            if given:
                raise UsageError(f"{name} is for exported artifacts; {source.path} is drawn by torch, leave {name} out, or export it first")
        images = sample(load_pipeline(source.path), sampler, prompts, drawn, size_px=size_px, **options)
    more = {"guidance": weight, "negative": negative or ""} if weight != 1 else {}
    if init_image:
        more |= {"init_image": init_image.name, "strength": strength}
    for path, image, prompt, own_seed in zip(files, images, prompts, drawn, strict=True):
        write_png(path, image, texts(prompt, own_seed, sigmas, source.manifest.digest, **more))
    if contact_sheet:
        write_png(beside["grid"], sheet(images, columns=len(seeds or [])), {})
    return files


def _on_device(
    source: Artifact, prompts: list[str], seeds: list[int], engine: str, memory: str | None, options: dict[str, Any]
) -> NDArray[np.uint8]:
    from flashgen.device.choice import choose, installed
    from flashgen.device.memory import parse_bytes, plan
    from flashgen.device.sampler import DevicePipeline

    budget = None if memory is None else parse_bytes(memory)
    names, plans = installed() if engine == "auto" else [engine], {}
    asked = {"guided": options["guidance"] != 1, "preview": "preview" in options, "init": "init" in options}
    for name in names if budget is not None else ():
        try:
            plans[name] = plan(source, name, len(prompts), options["batch"], budget, **asked)
        except MachineError:
            if not plans and name == names[-1]:
                raise
    engine = choose(source, len(prompts) * (len(options["sigmas"]) - 1), [*plans] or names)
    if plans:
        say(f"memory: {plans[engine]}")
    return DevicePipeline(source, engine=engine).sample(prompts, seeds, within=plans.get(engine), **options)


def _preview(path: Path) -> Callable[[int, Callable[[], NDArray[np.uint8]]], None]:
    say(f"preview: {path}, the first picture of a batch as it would become")
    return lambda step, picture: write_png(path, picture(), {"step": str(step + 1)})


def _start(source: Artifact, path: Path, strength: float, sigmas: list[float], size_px: int) -> dict[str, Any]:
    """`init` [H, W, 3] and the sigmas that are left, for `sample`."""
    if source.manifest.kind == "device" and not any(file.path == "vae_encoder/model.onnx" for file in source.manifest.files):
        mend = "export again with --set export.vae_encoder=true, or generate from the student"
        raise UsageError(f"--init-image: {source.path} was exported without the VAE's encoder; {mend}")
    left = [sigma for sigma in sigmas if sigma <= strength]
    if len(left) < 2:
        least = min(sigma for sigma in sigmas if sigma > 0)
        raise UsageError(f"--strength {strength:g} leaves no step of {', '.join(f'{s:.3g}' for s in sigmas)}; use {least:.3g} or more")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((size_px, size_px), Image.Resampling.LANCZOS))
    except (OSError, ValueError) as error:
        raise UsageError(f"--init-image {path} is no picture that can be read ({error})") from error
    return {"init": pixels, "sigmas": left}


def read_seeds(text: str) -> list[int]:
    """`1,5-9` is 1, 5, 6, 7, 8, 9. Raises UsageError for anything else, and for more than `MOST_SEEDS`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MOST_SEEDS - len(found):
            raise UsageError(f"--seeds {text}: numbers and rising ranges, as in 1,5-9, {MOST_SEEDS} at most")
        found += range(first, last + 1)
    return found


def again(png: Path, artifact: str, prompts: list[str], asked: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Prompt and options of the picture that `png` says it is; raises UsageError when something else is asked for as well."""
    if prompts or any(asked.values()):
        raise UsageError("--from-png brings prompt, seed, steps, guidance, negative and size with it; leave those out")
    made = read_texts(png)
    if "init_image" in made:
        raise UsageError(f"--from-png {png} began with --init-image {made['init_image']}, which it does not hold; give both again by hand")
    source = open_artifact(artifact)
    if made["artifact"] != source.manifest.digest:
        warn(f"{png} was drawn by another artifact ({made['artifact'][:19]}...), so expect another picture")
    size = {"size_px": made["size_px"]} if source.manifest.kind != "device" else {}  # that draws one size
    return [made["prompt"]], {"steps": len(made["sigmas"]) - 1} | {k: made[k] for k in ("seed", "guidance", "negative")} | size


def check_request(
    source: Artifact,
    prompts: list[str],
    seeds: list[int],
    steps: int | None,
    guidance: float | None,
    size_px: int | None,
    negative: str | None,
) -> Sampler:
    """The artifact's sampler, once everything asked for is known to be possible. Warns about what will have no effect."""
    sampler = sampler_of(source)
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError('the prompt is empty; write what to draw, as in: flashgen generate ARTIFACT "a red circle" -o a.png')
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**64]:
        raise UsageError(f"--seed {wrong[0]} is out of range; use 0 to 2^64-1")
    teacher = source.manifest.kind == "teacher" or not sampler.trained_steps
    if steps is not None and (steps < 1 or not (teacher or steps in sampler.trained_steps)):
        can = "1 or more" if teacher else ", ".join(map(str, sampler.trained_steps))
        raise UsageError(
            f"--steps {steps}: {source.path} draws in {can} steps; leave --steps out, or distill with --set distill.steps={steps}"
        )
    if guidance is not None and not 1 <= guidance < 100:
        raise UsageError(f"--guidance {guidance:g} is out of range; use 1 (none) to 100")
    weight = sampler.guidance if guidance is None else guidance
    if not teacher and weight != sampler.guidance:
        warn(f"{source.path} was trained for guidance {sampler.guidance:g}; {weight:g} costs two passes a step and oversaturates")
    if negative and weight == 1:
        warn("--negative has NO EFFECT at guidance 1, where nothing is subtracted; add --guidance 2 or more, or leave it out")
    _check_size(source, sampler, size_px)
    return sampler


def sampler_of(source: Artifact) -> Sampler:
    """How to draw from `source`. Raises ArtifactError when flashgen cannot."""
    sampler = source.manifest.sampler
    if source.manifest.kind == "gguf":
        raise ArtifactError(
            f"{source.path} is a transformer for stable-diffusion.cpp, ComfyUI-GGUF or diffusers, which read its model.gguf; with flashgen "
            f"draw from what it was exported from, {source.manifest.parents[0].path}"
        )
    if sampler is None:
        raise ArtifactError(f"{source.path}: the manifest has no sampler, so nothing says how to draw; make it again with --force")
    return sampler


def _check_size(source: Artifact, sampler: Sampler, size_px: int | None) -> None:
    if size_px is None or size_px == sampler.size_px:
        return
    if source.manifest.kind == "device":
        mend = f"leave --size out, or export again with --set export.size_px={size_px}"
        raise UsageError(f"--size {size_px}: this export draws {sampler.size_px} px only; {mend}")
    check_size(source, sampler, size_px, "--size ")


def _outputs(out: Path, count: int, beside: list[Path]) -> list[Path]:
    """The pictures' files, known to be writable as those `beside` them are."""
    out = Path(out)
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
