"""Drawing pictures with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning, concatenate
from flashgen.flow.ode import euler, guide
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts, warn_of_cuts
from flashgen.noise import latents
from flashgen.pixels import Size, from_uint8, require_finite, slices, to_uint8
from flashgen.progress import Progress
from flashgen.runtime.timing import Laps

Preview = Callable[[int, Callable[[], NDArray[np.uint8]]], None]  # called with (step, a function that decodes the first picture so far)


def latent_shape(pipe: Pipeline, size: Size) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a picture."""
    return pipe.family.latent_shape(pipe.configs, size)


def sample(pipe: Pipeline, sampler: Sampler, prompts: list[str], seeds: list[int], batch: int = 32, **options: Any) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of `prompts`; `options` are those of `sample_latents`.

    The diffusers pipeline of the same folder gives the same pictures with the call in docs/artifacts.md.
    """
    laps = options["laps"] = options.get("laps") or Laps()
    z = sample_latents(pipe, sampler, prompts, seeds, batch, **options)
    pictures = []
    for rows in slices(len(z), batch):
        with laps.lap("decode"):
            pictures.append(decode(pipe, z[rows]))
    return np.concatenate(pictures)


@torch.no_grad()
def sample_latents(
    pipe: Pipeline,
    sampler: Sampler,
    prompts: list[str],
    seeds: list[int],
    batch: int = 32,
    *,
    guidance: float | None = None,
    sigmas: Sequence[float] | None = None,
    size_px: Size | None = None,
    negative: str = "",
    init: NDArray[np.uint8] | None = None,
    preview: Preview | None = None,
    laps: Laps | None = None,
) -> Tensor:
    """Final latents [B, C, h, w] of `prompts`; row i starts from the noise of seeds[i].

    Defaults are the sampler's. With `init`, a picture [H, W, 3], rows start from a mixture of it and their noise at sigmas[0]. `preview`
    is called at every step of each batch.
    """
    laps = laps or Laps()
    sigmas = sampler.sigmas if sigmas is None else sigmas
    weight = sampler.guidance if guidance is None else guidance
    x = torch.from_numpy(latents(latent_shape(pipe, size_px or sampler.size_px), seeds)).to(pipe.device)
    if init is not None:
        x = (1 - sigmas[0]) * pipe.family.to_latents(pipe.vae, torch.from_numpy(from_uint8(init)).to(pipe.device)) + sigmas[0] * x
    warn_of_cuts(pipe, list(dict.fromkeys([*prompts, *([negative] if weight != 1 else [])])), sampler)
    uncond = encode_prompts(pipe, [negative], sampler) if weight != 1 else None
    found, parts = [], slices(len(prompts), batch)
    with Progress("draw", len(parts) * (len(sigmas) - 1)) as progress:
        for rows in parts:
            with laps.lap("encode"):
                cond = encode_prompts(pipe, prompts[rows], sampler)
            require_finite(all(bool(value.isfinite().all()) for value in cond.tensors.values()), f"a text encoder of {pipe.folder}")
            step = _velocity(pipe, cond, uncond, weight, laps, progress)
            watch = None if preview is None else _watch(pipe, preview)
            found.append(euler(x[rows], step, sigmas, sampler.scales_on(sigmas), watch))
    return torch.cat(found)


def _velocity(
    pipe: Pipeline, cond: Conditioning, uncond: Conditioning | None, weight: float, laps: Laps, progress: Progress
) -> Callable[[Tensor, float, int], Tensor]:
    """The guided velocity of one batch as `euler` calls it; advances `progress` by one per step."""
    rows = len(cond)
    both = cond if uncond is None else concatenate([uncond.expand(rows), cond])

    def step(x: Tensor, sigma: float, _: int) -> Tensor:
        with laps.lap("step"):
            doubled = x if uncond is None else torch.cat([x, x])
            v = velocity(pipe.transformer, doubled, torch.full((len(doubled),), sigma, device=x.device), both)
        progress.advance()
        return v if uncond is None else guide(v[:rows], v[rows:], weight)

    return step


def _watch(pipe: Pipeline, preview: Preview) -> Callable[[int, Tensor], None]:
    return lambda index, x0: preview(index, lambda: decode(pipe, x0[:1])[0])


@torch.no_grad()
def decode(pipe: Pipeline, z: Tensor) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of latents [B, C, h, w]. Raises NumericsError, naming the network, for numbers that are not finite."""
    require_finite(bool(z.isfinite().all()), f"transformer of {pipe.folder}")
    return to_uint8(pipe.family.from_latents(pipe.vae, z).cpu().numpy())
