"""Loading a diffusers-layout artifact and drawing pictures from it with torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.device.noise import latents
from flashgen.device.sampler import Preview, from_uint8, slices, to_uint8
from flashgen.errors import ArtifactError
from flashgen.flow.ode import euler, guide
from flashgen.models.networks import check_networks, has_nf4, on_disk, with_nf4
from flashgen.models.specs import ENCODERS
from flashgen.models.text import Conditioning, encode_prompts, is_large, warn_of_cuts
from flashgen.progress import track
from flashgen.timing import Laps


def load_pipeline(
    path: str | Path, dtype: torch.dtype = torch.float32, weights: Literal["all", "text", "disk"] = "all"
) -> StableDiffusion3Pipeline:
    """An SD3-class pipeline in eval mode, the transformer in `dtype` and the rest in fp32.

    Large text encoders stay on disk and compute in bf16, in which T5-XXL was trained (`models.networks.on_disk`). With weights "text"
    transformer and VAE are shapes without weights, with "disk" every network stays on disk, in fp32. Safetensors only, nothing
    fetched, no code from the artifact. Raises ArtifactError before anything large is read.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # a bar for each of nine parts, gone in a blink
    path = Path(path)
    networks = check_networks(path)
    index = json.loads((path / "model_index.json").read_text())
    given: dict[str, Any] = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
    if weights == "disk":
        given |= {name: on_disk(path / name, network, torch.float32) for name, network in networks.items()}
    else:
        large = [name for name in ENCODERS if name in networks and is_large(path / name)]
        given |= {name: on_disk(path / name, networks[name], torch.bfloat16) for name in large}
        given |= {name: networks[name] for name in ("transformer", "vae") if weights == "text"}
        if weights == "all" and has_nf4(path / "transformer"):  # diffusers would want bitsandbytes and a GPU
            given["transformer"] = with_nf4(path / "transformer", networks["transformer"], dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype to dtype; older ones know the old name only
            pipe: StableDiffusion3Pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(path),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype={"transformer": dtype, "default": torch.float32},
                **given,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ArtifactError(f"{path} does not load as an SD3 pipeline ({error}); check it with: flashgen show {path} --verify") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def latent_shape(pipe: StableDiffusion3Pipeline, size_px: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of square pictures."""
    side = size_px // pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, side, side


def sample(
    pipe: StableDiffusion3Pipeline, sampler: Sampler, prompts: list[str], seeds: list[int], batch: int = 32, **options: Any
) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of `prompts`; `options` are those of `sample_latents`.

    The same picture in diffusers, whose scheduler shifts the sigmas that it is given (docs/artifacts.md), hence `unshift`:

        noise = torch.from_numpy(flashgen.device.noise.latents((16, size_px // 8, size_px // 8), [seed]))
        pipe = StableDiffusion3Pipeline.from_pretrained(path)
        pipe(prompt, latents=noise, sigmas=[unshift(s, sampler.shift) for s in sampler.sigmas[:-1]],
             guidance_scale=sampler.guidance, max_sequence_length=sampler.t5_tokens, height=size_px, width=size_px)

    diffusers guides when guidance_scale > 1, so a student's 1.0 means one forward a step there too. Without T5 (sampler.encoder
    zeros or prune) from_pretrained wants text_encoder_3=None, tokenizer_3=None said aloud; with prune, t5_tokens and thus
    max_sequence_length is 0: the T5 part of the sequence is empty, not zeros.
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
    pipe: StableDiffusion3Pipeline,
    sampler: Sampler,
    prompts: list[str],
    seeds: list[int],
    batch: int = 32,
    *,
    guidance: float | None = None,
    sigmas: Sequence[float] | None = None,
    size_px: int | None = None,
    negative: str = "",
    init: NDArray[np.uint8] | None = None,
    preview: Preview | None = None,
    laps: Laps | None = None,
) -> Tensor:
    """Final latents [B, C, h, w] of `prompts`; latents i start from the noise of seeds[i], or from a mixture at sigmas[0] of that and the
    picture `init` [H, W, 3]. Defaults are the sampler's. `preview` is shown every step of each batch.
    """
    laps = laps or Laps()
    sigmas = sampler.sigmas if sigmas is None else sigmas
    weight = sampler.guidance if guidance is None else guidance
    noise = torch.from_numpy(latents(latent_shape(pipe, size_px or sampler.size_px), seeds))
    if init is not None:
        noise = (1 - sigmas[0]) * encode_image(pipe, init) + sigmas[0] * noise
    warn_of_cuts(pipe, list(dict.fromkeys([*prompts, *([negative] if weight != 1 else [])])), sampler.t5_tokens)
    uncond = encode_prompts(pipe, [negative], sampler.t5_tokens) if weight != 1 else None

    def watch(index: int, x0: Tensor) -> None:
        if preview is not None:
            preview(index, lambda: decode(pipe, x0[:1])[0])

    found, parts = [], slices(len(prompts), batch)
    count = len(parts) * (len(sigmas) - 1)
    tick = iter(track(range(count), "draw", total=count))
    for rows in parts:
        with laps.lap("encode"):
            cond = encode_prompts(pipe, prompts[rows], sampler.t5_tokens)
        found.append(_denoise(pipe, noise[rows], cond, uncond, weight, sigmas, sampler.scales_on(sigmas), tick, laps, watch))
    next(tick, None)
    return torch.cat(found)


def encode_image(pipe: StableDiffusion3Pipeline, image: NDArray[np.uint8]) -> Tensor:
    """Latents [1, C, h, w] of a picture [H, W, 3] on the transformer's scale: the mode of what the VAE says."""
    z: Tensor = pipe.vae.encode(torch.from_numpy(from_uint8(image))).latent_dist.mode()
    scaled: Tensor = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return scaled


@torch.no_grad()
def decode(pipe: StableDiffusion3Pipeline, z: Tensor) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of latents [B, C, h, w] on the transformer's scale."""
    scaled = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return to_uint8(pipe.vae.decode(scaled, return_dict=False)[0].numpy())


def _denoise(
    pipe: StableDiffusion3Pipeline,
    x: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    weight: float,
    sigmas: Sequence[float],
    scales: list[tuple[float, float]] | None,
    tick: Iterator[int],
    laps: Laps,
    watch: Callable[[int, Tensor], None],
) -> Tensor:
    rows = len(x)
    if uncond is not None:
        embeds = torch.cat([uncond.embeds.expand(rows, -1, -1), cond.embeds])
        cond = Conditioning(embeds, torch.cat([uncond.pooled.expand(rows, -1), cond.pooled]))

    def velocity(x: Tensor, sigma: float, _: int) -> Tensor:
        next(tick)
        with laps.lap("step"):
            doubled = x if uncond is None else torch.cat([x, x])
            timestep = torch.full((len(doubled),), 1000 * sigma)
            v: Tensor = pipe.transformer(doubled, cond.embeds, cond.pooled, timestep, return_dict=False)[0]
        return v if uncond is None else guide(v[:rows], v[rows:], weight)

    return euler(x, velocity, sigmas, scales, watch)
