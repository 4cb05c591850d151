"""Pictures that `generate` is asked for, checked against what the artifact can do before any network is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen import families
from flashgen.artifact.manifest import MAX_STEPS, Sampler
from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.families.configs import configs_in
from flashgen.flow.grid import shifted_grid
from flashgen.pixels import Size, read_size
from flashgen.png import fit, read_picture, read_texts
from flashgen.progress import warn
from flashgen.stages.inputs import sampler_of
from flashgen.stages.rows import is_unicode
from flashgen.stages.sizes import check_size

MAX_SEEDS = 10_000
MAX_GUIDANCE = 100


@dataclass(frozen=True)
class Request:
    """Pictures to draw: prompt i from seeds[i]. None means the artifact's own setting."""

    prompts: list[str]
    seeds: list[int]
    steps: int | None = None
    guidance: float | None = None
    size: Size | None = None
    negative: str = ""
    init_image: Path | None = None
    strength: float = 0.8

    def check(self, source: Artifact) -> Sampler:
        """The artifact's sampler. Raises UsageError for what it cannot do, and warns about options without effect."""
        sampler = sampler_of(source)
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UsageError('the prompt is empty; write what to draw, as in: flashgen generate ARTIFACT "a red circle" -o a.png')
        if broken := [text for text in (*self.prompts, self.negative) if not is_unicode(text)]:
            raise UsageError(f"{broken[0][:60]!a} is not valid UTF-8; set the terminal to UTF-8, or write a file for --prompt-file")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**64]:
            raise UsageError(f"--seed {wrong[0]} is out of range; use 0 to 2^64-1")
        teacher = source.manifest.kind == "teacher" or not sampler.trained_steps
        if self.steps is not None and not (1 <= self.steps <= MAX_STEPS and (teacher or self.steps in sampler.trained_steps)):
            can = f"1 to {MAX_STEPS}" if teacher else ", ".join(map(str, sampler.trained_steps))
            raise UsageError(
                f"--steps {self.steps}: {source.path} draws in {can} steps; leave --steps out, or distill with "
                f"--set distill.steps={self.steps}"
            )
        if self.guidance is not None and not 1 <= self.guidance < MAX_GUIDANCE:
            raise UsageError(f"--guidance {self.guidance:g} is out of range; use 1 (none) to {MAX_GUIDANCE}")
        weight = self.weight(sampler)
        if not teacher and weight != sampler.guidance:
            warn(f"{source.path} was trained for guidance {sampler.guidance:g}; {weight:g} costs two passes per step and oversaturates")
        if self.negative and weight == 1:
            warn("--negative has NO EFFECT at guidance 1, where nothing is subtracted; add --guidance 2 or more, or leave it out")
        if self.size is not None and self.size != sampler.size_px:
            if source.manifest.kind == "device":
                mend = f"leave --size out, or export again with --set export.size_px={self.size}"
                raise UsageError(f"--size {self.size}: this export draws {sampler.size_px} px only; {mend}")
            family = families.get(source.manifest.family)
            check_size(family, configs_in(source.path, family), sampler, self.size, "--size ")
        return sampler

    def weight(self, sampler: Sampler) -> float:
        """Guidance weight."""
        return sampler.guidance if self.guidance is None else self.guidance

    def sigmas(self, sampler: Sampler) -> list[float]:
        """Noise levels of the steps, from the start noise or from `init_image`. Raises UsageError when `strength` leaves no step."""
        same = self.steps is None or self.steps == sampler.num_steps
        sigmas = sampler.sigmas if same else shifted_grid(self.steps or 0, sampler.shift)
        if self.init_image is None:
            return sigmas
        remaining = [sigma for sigma in sigmas if sigma <= self.strength]
        if len(remaining) < 2:
            least = min(sigma for sigma in sigmas if sigma > 0)
            levels = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
            raise UsageError(f"--strength {self.strength:g} leaves no step of {levels}; use {least:.3g} or more")
        return remaining

    def init(self, source: Artifact, sampler: Sampler) -> NDArray[np.uint8] | None:
        """The largest centred part of `init_image` with the proportions of the pictures, at their size, [H, W, 3].

        Raises UsageError when it cannot be read or the VAE's encoder is missing.
        """
        if self.init_image is None:
            return None
        if source.manifest.kind == "device" and not any(file.path == "vae_encoder/model.onnx" for file in source.manifest.files):
            mend = "export again with --set export.vae_encoder=true, or generate from the student"
            raise UsageError(f"--init-image: {source.path} was exported without the VAE's encoder; {mend}")
        size = self.size or sampler.size_px
        try:
            picture = read_picture(self.init_image)
        except (OSError, ValueError) as error:
            raise UsageError(f"--init-image {self.init_image} is no picture that can be read ({error})") from error
        start = fit(picture, size)
        if abs(picture.shape[1] * size.height - picture.shape[0] * size.width) > max(picture.shape[:2]) * max(size) / 100:
            warn(f"--init-image {self.init_image} is {picture.shape[1]}x{picture.shape[0]}: cropped to the proportions of {size}")
        return start


def read_seeds(text: str) -> list[int]:
    """`1,5-9` is 1, 5, 6, 7, 8, 9. Raises UsageError for anything else, and for more than `MAX_SEEDS`."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})(?:\s*-\s*(\d{1,20}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MAX_SEEDS - len(seeds):
            raise UsageError(f"--seeds {text}: numbers and rising ranges, as in 1,5-9, {MAX_SEEDS} at most")
        seeds += range(first, last + 1)
    return seeds


def option_size(text: str | None) -> Size | None:
    """The value of `--size`. Raises UsageError for text that is no size."""
    try:
        return None if text is None else read_size(text)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error


def request_of_png(png: Path, source: Artifact) -> Request:
    """The request that drew `png`. Raises UsageError for a picture that does not say, or that began with another picture."""
    texts = read_texts(png)
    if "init_image" in texts:
        raise UsageError(f"--from-png {png} began with --init-image {texts['init_image']}, which it does not hold; give both again by hand")
    if texts["artifact"] != source.manifest.digest:
        warn(f"{png} was drawn by another artifact ({texts['artifact'][:19]}...), so expect another picture")
    settings: dict[str, Any] = {name: texts[name] for name in ("guidance", "negative")}
    size = None if source.manifest.kind == "device" else texts["size_px"]  # an export draws one size
    return Request([texts["prompt"]], [texts["seed"]], steps=len(texts["sigmas"]) - 1, size=size, **settings)
