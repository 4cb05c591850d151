"""Drawing pictures from an exported artifact with numpy and onnxruntime alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.device.engine import Engine, choose
from flashgen.device.noise import latents
from flashgen.device.tokens import PromptTokenizer
from flashgen.errors import ArtifactError
from flashgen.flow.ode import euler, guide
from flashgen.progress import track
from flashgen.timing import Laps

Floats = NDArray[np.float32]
CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class DevicePipeline:
    """All prompts pass one component before the next is loaded, so that one network at a time is in memory."""

    def __init__(self, artifact: Artifact, threads: int | None = None, laps: Laps | None = None, engine: str = "onnxruntime") -> None:
        if artifact.manifest.sampler is None:
            raise ArtifactError(f"{artifact.path}: the manifest has no sampler; export the student again with: flashgen export")
        self.sampler: Sampler = artifact.manifest.sampler
        self.extra = artifact.manifest.extra
        if engine == "auto":
            engine = choose(artifact.path, artifact.manifest.digest, self._one_step(artifact.path), threads)
        self.engine = Engine(artifact.path, threads, laps, engine)

    def _one_step(self, path: Path) -> dict[str, Floats]:
        """Inputs of the transformer for one picture, all zeros."""
        width = json.loads((path / "transformer" / "config.json").read_text())["pooled_projection_dim"]
        tokens = self.sampler.clip_tokens + self.sampler.t5_tokens
        shapes = {"hidden_states": (1, *self.extra["latent_shape"]), "encoder_hidden_states": (1, tokens, int(self.extra["joint_dim"]))}
        return {k: np.zeros(v, np.float32) for k, v in (shapes | {"pooled_projections": (1, width), "timestep": (1,)}).items()}

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        sigmas: Sequence[float] | None = None,
        guidance: float | None = None,
        negative: str = "",
        batch: int = 32,
    ) -> NDArray[np.uint8]:
        """Pictures [B, H, W, 3] of `prompts`; picture i starts from the noise of seeds[i]. Defaults are the manifest's."""
        sigmas = self.sampler.sigmas if sigmas is None else sigmas
        weight = self.sampler.guidance if guidance is None else guidance
        embeds, pooled = self.encode(prompts, batch)
        uncond = self.encode([negative], batch) if weight != 1 else None
        noise = latents(tuple(self.extra["latent_shape"]), seeds)
        parts = slices(len(prompts), batch)
        count = len(parts) * (len(sigmas) - 1)
        tick = iter(track(range(count), "draw", total=count))
        z = [self.denoise(noise[s], embeds[s], pooled[s], uncond, weight, sigmas, tick) for s in parts]
        next(tick, None)
        vae = self.extra["vae"]
        scaled = np.concatenate(z) / np.float32(vae["scaling_factor"]) + np.float32(vae["shift_factor"])
        return np.concatenate([to_uint8(self.engine.run("vae_decoder", ["sample"], {"latent_sample": scaled[s]})[0]) for s in parts])

    def encode(self, prompts: list[str], batch: int) -> tuple[Floats, Floats]:
        """Embeddings [B, L, D] and pooled [B, P] as `StableDiffusion3Pipeline.encode_prompt` builds them."""
        features, pooled = zip(*(self._clip(encoder, tokenizer, prompts, batch) for encoder, tokenizer in CLIPS), strict=True)
        clip = np.concatenate(features, -1)
        width = int(self.extra["joint_dim"])
        clip = np.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
        if self.sampler.has_t5:
            ids = self._ids("tokenizer_3", prompts)
            parts = [
                self.engine.run("text_encoder_3", ["last_hidden_state"], {"input_ids": ids[s]})[0] for s in slices(len(prompts), batch)
            ]
            t5 = np.concatenate(parts)
        else:  # zeros keep their places in the sequence; a pruned encoder has 0 of them
            t5 = np.zeros((len(prompts), self.sampler.t5_tokens, width), np.float32)
        return np.concatenate([clip, t5], 1), np.concatenate(pooled, -1)

    def _clip(self, encoder: str, tokenizer: str, prompts: list[str], batch: int) -> tuple[Floats, Floats]:
        ids = self._ids(tokenizer, prompts)
        hidden = [m for name in self.engine.network(encoder).outputs if (m := re.fullmatch(r"hidden_states\.(\d+)", name))]
        names = [max(hidden, key=lambda m: int(m.group(1))).group(), "text_embeds"]
        parts = [self.engine.run(encoder, names, {"input_ids": ids[s]}) for s in slices(len(prompts), batch)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _ids(self, name: str, prompts: list[str]) -> NDArray[np.int64]:
        spec = self.extra["tokenizers"][name]
        return PromptTokenizer(self.engine.path / name / "tokenizer.json", spec["length"], spec["pad_id"]).encode(prompts)

    def denoise(
        self,
        x: Floats,
        embeds: Floats,
        pooled: Floats,
        uncond: tuple[Floats, Floats] | None,
        weight: float,
        sigmas: Sequence[float],
        tick: Iterator[int],
    ) -> Floats:
        """Euler from noise `x` [B, C, h, w] along `sigmas`, guided away from `uncond` when that is given; one `tick` a step."""
        rows = len(x)
        if uncond is not None:
            embeds = np.concatenate([np.repeat(uncond[0], rows, 0), embeds])
            pooled = np.concatenate([np.repeat(uncond[1], rows, 0), pooled])

        def velocity(x: Floats, sigma: float, _: int) -> Floats:
            next(tick)
            doubled = x if uncond is None else np.concatenate([x, x])
            feeds = {"hidden_states": doubled, "encoder_hidden_states": embeds, "pooled_projections": pooled}
            feeds["timestep"] = np.full(len(doubled), 1000 * sigma, np.float32)
            v = self.engine.run("transformer", ["out_hidden_states"], feeds)[0]
            return v if uncond is None else guide(v[:rows], v[rows:], weight)

        return euler(x, velocity, sigmas, self.sampler.scales_on(sigmas))


def to_uint8(sample: Floats) -> NDArray[np.uint8]:
    """Decoder output [B, 3, H, W] in [-1, 1] to pictures [B, H, W, 3], rounded as diffusers rounds."""
    return np.asarray(np.round(np.clip(sample / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255), np.uint8)


def slices(count: int, batch: int) -> list[slice]:
    return [slice(i, i + batch) for i in range(0, count, batch)]
