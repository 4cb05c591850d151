"""generate: pictures from any artifact; torch for diffusers layouts, onnxruntime alone for exported ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device.png import texts, write_png
from flashgen.errors import ArtifactError, UsageError
from flashgen.flow.grid import few_step_grid
from flashgen.progress import say, warn


def run(
    artifact: str,
    prompts: list[str],
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size_px: int | None = None,
    negative: str | None = None,
) -> list[Path]:
    """Draw `prompts` and return the PNG files: `out` for one prompt, out-1.png, out-2.png, ... beside it for several.

    Prompt i is drawn from seed + i; every file's text chunks say how to draw it again. Raises UsageError, before any
    network is loaded, for what the artifact cannot do.
    """
    source = open_artifact(artifact)
    sampler = check_request(source, prompts, seed, steps, guidance, size_px, negative)
    files = _outputs(out, len(prompts))
    weight = sampler.guidance if guidance is None else guidance
    sigmas = sampler.sigmas if steps is None or steps == len(sampler.sigmas) - 1 else few_step_grid(steps, sampler.shift)
    seeds = [seed + i for i in range(len(prompts))]
    options: dict[str, Any] = {"guidance": weight, "sigmas": sigmas, "negative": negative or ""}
    if source.manifest.kind == "device":
        from flashgen.device.sampler import DevicePipeline

        images = DevicePipeline(source).sample(prompts, seeds, **options)
    else:
        from flashgen.models.sample import load_pipeline, sample

        images = sample(load_pipeline(source.path), sampler, prompts, seeds, size_px=size_px, **options)
    more = {"guidance": weight, "negative": negative or ""} if weight != 1 else {}
    for path, image, prompt, own_seed in zip(files, images, prompts, seeds, strict=True):
        write_png(path, image, texts(prompt, own_seed, sigmas, source.manifest.digest, **more))
    return files


def check_request(
    source: Artifact, prompts: list[str], seed: int, steps: int | None, guidance: float | None, size_px: int | None, negative: str | None
) -> Sampler:
    """The artifact's sampler, once everything asked for is known to be possible. Warns about what will have no effect."""
    sampler = sampler_of(source)
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError('the prompt is empty; write what to draw, as in: flashgen generate ARTIFACT "a red circle" -o a.png')
    if not 0 <= seed < 2**64 - len(prompts):
        raise UsageError(f"--seed {seed} is out of range; use 0 to 2^64-1")
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
        raise UsageError(f"--size {size_px}: this export draws {sampler.size_px} px only; leave --size out, or generate from the student")
    transformer, vae = (json.loads((source.path / part / "config.json").read_text()) for part in ("transformer", "vae"))
    unit = transformer["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    largest = unit * transformer["pos_embed_max_size"]
    if size_px < unit or size_px % unit or size_px > largest:
        raise UsageError(f"--size {size_px}: this model draws multiples of {unit} px up to {largest}; it was trained at {sampler.size_px}")
    warn(f"trained at {sampler.size_px} px; at {size_px} px expect worse pictures")


def _outputs(out: Path, count: int) -> list[Path]:
    """The files to write, known to be writable."""
    out = Path(out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"--out {out} is not a .png file name; write for instance -o {out.with_suffix('.png') if out.name else 'a.png'}")
    files = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}: {out.parent}; name a folder that can be written to") from error
    blocked = next((p for p in files if p.is_dir() or not os.access(p if p.exists() else p.parent, os.W_OK)), None)
    if blocked:
        raise UsageError(f"--out {blocked} cannot be written; name another file, or mend its permissions")
    if count > 1:
        say(f"{count} prompts, so the files are {files[0].name} to {files[-1].name}")
    return files
