"""Drawing pictures from an exported artifact with numpy and an engine alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.device.engine import Engine
from flashgen.device.memory import Plan, out_of_memory, plan, smaller_tile
from flashgen.device.noise import latents
from flashgen.device.tiles import decode_tiled
from flashgen.device.tokens import PromptTokenizer
from flashgen.errors import ArtifactError, MachineError
from flashgen.flow.ode import euler, guide
from flashgen.progress import track, warn
from flashgen.timing import Laps

Floats = NDArray[np.float32]
Preview = Callable[[int, Callable[[], NDArray[np.uint8]]], None]  # (step, what decodes the first picture as it would become)
CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class DevicePipeline:
    """All prompts pass one component before the next is loaded, so that one network at a time is in memory."""

    def __init__(self, artifact: Artifact, laps: Laps | None = None, engine: str = "onnxruntime") -> None:
        if artifact.manifest.sampler is None:
            raise ArtifactError(f"{artifact.path}: the manifest has no sampler; export the student again with: flashgen export")
        self.artifact = artifact
        self.sampler: Sampler = artifact.manifest.sampler
        self.extra = artifact.manifest.extra
        self.engine = Engine(artifact, laps, engine)
        self._tile: int | None = None

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        sigmas: Sequence[float] | None = None,
        guidance: float | None = None,
        negative: str = "",
        batch: int = 32,
        init: NDArray[np.uint8] | None = None,
        preview: Preview | None = None,
        within: Plan | None = None,
    ) -> NDArray[np.uint8]:
        """Pictures [B, H, W, 3] of `prompts`; picture i starts from the noise of seeds[i]. Defaults are the manifest's.

        With `init` [H, W, 3] all start from a mixture of that picture and their noise at sigmas[0]. `preview` is shown every step of
        each batch; it keeps the decoder in memory, too. `within` says how to keep memory low; by default `batch` goes and only the
        decoder is spared.
        """
        sigmas = self.sampler.sigmas if sigmas is None else sigmas
        weight = self.sampler.guidance if guidance is None else guidance
        asked = {"guided": weight != 1, "preview": preview is not None, "init": init is not None}
        within = within or plan(self.artifact, self.engine.name, len(prompts), batch, **asked)
        batch, self._tile = within.batch, within.tile
        embeds, pooled = self.encode(prompts, batch)
        uncond = self.encode([negative], batch) if weight != 1 else None
        noise = latents(tuple(self.extra["latent_shape"]), seeds)
        if init is not None:
            noise = np.float32(1 - sigmas[0]) * self.encode_picture(init) + np.float32(sigmas[0]) * noise
        viewer = Engine(self.artifact, name=self.engine.name)

        def watch(index: int, x0: Floats) -> None:
            if preview is not None:
                preview(index, lambda: self.decode(x0[:1], viewer)[0])

        parts = slices(len(prompts), batch)
        count = len(parts) * (len(sigmas) - 1)
        tick = iter(track(range(count), "draw", total=count))
        z = np.concatenate([self.denoise(noise[s], embeds[s], pooled[s], uncond, weight, sigmas, tick, watch) for s in parts])
        next(tick, None)
        viewer.close()
        return np.concatenate([self.decode(z[s], self.engine) for s in slices(len(z), within.rows)])

    def decode(self, z: Floats, engine: Engine) -> NDArray[np.uint8]:
        """Pictures [B, H, W, 3] of latents [B, C, h, w] on the transformer's scale.

        When memory runs out one picture at a time, then in smaller and smaller tiles, which later pictures begin with. Raises
        MachineError when the smallest do not fit.
        """
        vae = self.extra["vae"]
        factor = self.sampler.size_px // int(self.extra["latent_shape"][-1])  # pixels a latent
        scaled = z / np.float32(vae["scaling_factor"]) + np.float32(vae["shift_factor"])

        def run(part: Floats) -> Floats:
            return engine.run("vae_decoder", ["sample"], {"latent_sample": part})[0]

        engine.network("vae_decoder")  # loading is no part of decoding
        while True:
            try:
                with engine.laps.lap("decode"):
                    return to_uint8(run(scaled) if self._tile is None else decode_tiled(run, scaled, self._tile, factor))
            except Exception as error:  # the engines' exception types have no common base
                if not out_of_memory(error):
                    raise
                smaller = smaller_tile(self._tile, z.shape[-1])
                if len(z) == 1 and smaller is None:
                    raise MachineError(f"decoding one picture ran out of memory ({type(error).__name__}); close other programs") from error
            if len(z) > 1:
                warn("decoding ran out of memory; again one picture at a time")
                return np.concatenate([self.decode(row[None], engine) for row in z])
            warn(f"decoding ran out of memory; again in tiles of {smaller} latents")
            self._tile = smaller

    def encode_picture(self, picture: NDArray[np.uint8]) -> Floats:
        """Latents [1, C, h, w] of a picture [H, W, 3] on the transformer's scale: the mode of what the VAE says."""
        moments = self.engine.run("vae_encoder", ["latent_parameters"], {"sample": from_uint8(picture)})[0]
        vae, mean = self.extra["vae"], moments[:, : moments.shape[1] // 2]
        return np.asarray((mean - np.float32(vae["shift_factor"])) * np.float32(vae["scaling_factor"]))

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
        watch: Callable[[int, Floats], None],
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

        return euler(x, velocity, sigmas, self.sampler.scales_on(sigmas), watch)


def to_uint8(sample: Floats) -> NDArray[np.uint8]:
    """Decoder output [B, 3, H, W] in [-1, 1] to pictures [B, H, W, 3], rounded as diffusers rounds."""
    return np.asarray(np.round(np.clip(sample / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255), np.uint8)


def from_uint8(picture: NDArray[np.uint8]) -> Floats:
    """A picture [H, W, 3] as the VAE encoder's input [1, 3, H, W] in [-1, 1]."""
    return (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def slices(count: int, batch: int) -> list[slice]:
    return [slice(i, i + batch) for i in range(0, count, batch)]
