"""Drawing pictures from an exported artifact with numpy and an engine alone, by the description in its manifest (`device.graph`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.store import Artifact
from flashgen.device.engine import Engine
from flashgen.device.graph import read_graph
from flashgen.device.memory import Plan, out_of_memory, plan, smaller_tile
from flashgen.device.providers import Choice
from flashgen.device.tiles import decode_tiled
from flashgen.device.tokens import PromptTokenizer
from flashgen.errors import MachineError
from flashgen.flow.ode import euler, guide
from flashgen.noise import latents
from flashgen.pixels import Floats, from_uint8, slices, to_uint8
from flashgen.progress import Progress, warn
from flashgen.runtime.timing import Laps

Preview = Callable[[int, Callable[[], NDArray[np.uint8]]], None]  # called with (step, a function that decodes the first picture so far)
Conditioning = Mapping[str, Floats]  # the transformer's text inputs [B, ...] by name


class DevicePipeline:
    """Draws with one network in memory at a time: all prompts pass a component before the next one is loaded."""

    def __init__(self, artifact: Artifact, laps: Laps | None = None, engine: str | Choice = "onnxruntime") -> None:
        self.graph = read_graph(artifact)
        assert artifact.manifest.sampler is not None  # read_graph needs it
        self.artifact, self.sampler = artifact, artifact.manifest.sampler
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

        With `init` [H, W, 3] all pictures start from a mixture of it and their noise at sigmas[0]. `preview` is called at every step of
        each batch, and keeps the decoder in memory. `within` limits batch and tiles; by default the
        machine's memory limits them.
        """
        sigmas = self.sampler.sigmas if sigmas is None else sigmas
        weight = self.sampler.guidance if guidance is None else guidance
        asked = {"guided": weight != 1, "preview": preview is not None, "init": init is not None}
        within = within or plan(self.artifact, self.engine.name, len(prompts), batch, **asked)
        self._tile = within.tile
        cond = self.encode(prompts, within.batch)
        uncond = self.encode([negative], within.batch) if weight != 1 else None
        x = latents(tuple(self.graph.latent_shape), seeds)
        if init is not None:
            x = np.float32(1 - sigmas[0]) * self.encode_picture(init) + np.float32(sigmas[0]) * x
        viewer = Engine(self.artifact, name=Choice(self.engine.name, self.engine.fallback))

        def watch(index: int, x0: Floats) -> None:
            if preview is not None:
                preview(index, lambda: self.decode(x0[:1], viewer)[0])

        parts, z = slices(len(prompts), within.batch), []
        with Progress("draw", len(parts) * (len(sigmas) - 1)) as progress:
            for rows in parts:
                step = self._velocity({name: value[rows] for name, value in cond.items()}, uncond, weight, progress)
                z.append(euler(x[rows], step, sigmas, self.sampler.scales_on(sigmas), watch))
        viewer.close()
        final = np.concatenate(z)
        return np.concatenate([self.decode(final[rows], self.engine) for rows in slices(len(final), within.rows)])

    def decode(self, z: Floats, engine: Engine) -> NDArray[np.uint8]:
        """Pictures [B, H, W, 3] of latents [B, C, h, w] on the transformer's scale.

        When memory runs out, pictures are decoded one at a time, then in smaller and smaller tiles, which later calls start with. Raises
        MachineError when the smallest tile does not fit.
        """
        vae = self.graph.vae
        scaled = z / np.float32(vae.scaling_factor) + np.float32(vae.shift_factor)

        def run(part: Floats) -> Floats:
            return engine.run("vae_decoder", ["sample"], {"latent_sample": part})[0]

        part = scaled if self._tile is None else scaled[:, :, : self._tile, : self._tile]
        engine.network("vae_decoder", {"latent_sample": part})  # loading is no part of decoding
        while True:
            try:
                with engine.laps.lap("decode"):
                    return to_uint8(run(scaled) if self._tile is None else decode_tiled(run, scaled, self._tile, vae.factor))
            except Exception as error:  # the engines' exception types have no common base
                if not out_of_memory(error):
                    raise
                smaller = smaller_tile(self._tile, max(z.shape[2:]))
                if len(z) == 1 and smaller is None:
                    raise MachineError(f"decoding one picture ran out of memory ({type(error).__name__}); close other programs") from error
            if len(z) > 1:
                warn("decoding ran out of memory; again one picture at a time")
                return np.concatenate([self.decode(row[None], engine) for row in z])
            warn(f"decoding ran out of memory; again in tiles of {smaller} latents")
            self._tile = smaller

    def encode_picture(self, picture: NDArray[np.uint8]) -> Floats:
        """Latents [1, C, h, w] of a picture [H, W, 3] on the transformer's scale: the mode of the VAE's posterior."""
        moments = self.engine.run("vae_encoder", ["latent_parameters"], {"sample": from_uint8(picture)})[0]
        vae, mean = self.graph.vae, moments[:, : moments.shape[1] // 2]
        return np.asarray((mean - np.float32(vae.shift_factor)) * np.float32(vae.scaling_factor))

    def encode(self, prompts: list[str], batch: int) -> Conditioning:
        """The transformer's text inputs for `prompts`, `batch` of which pass an encoder together."""
        values: dict[str, Floats] = {}
        for encoder in self.graph.encoders:
            file = self.engine.path / encoder.tokenizer / "tokenizer.json"
            tokens = PromptTokenizer(file, encoder.length, encoder.pad_id).encode(prompts)
            feeds = {encoder.ids: tokens.ids} | ({encoder.mask: tokens.mask} if encoder.mask else {})
            names = list(encoder.outputs.values())
            parts = [
                self.engine.run(encoder.component, names, {name: feed[rows] for name, feed in feeds.items()})
                for rows in slices(len(prompts), batch)
            ]
            values |= {value: np.concatenate(outputs) for value, outputs in zip(encoder.outputs, zip(*parts, strict=True), strict=True)}
            if encoder.mask_value:
                values[encoder.mask_value] = tokens.mask.astype(np.float32)
        return self.graph.condition(values, len(prompts))

    def _velocity(
        self, cond: Conditioning, uncond: Conditioning | None, weight: float, progress: Progress
    ) -> Callable[[Floats, float, int], Floats]:
        """The guided velocity of one batch as `euler` calls it; advances `progress` by one per step."""
        rows = len(next(iter(cond.values())))
        if uncond is not None:
            cond = {name: np.concatenate([np.repeat(uncond[name], rows, 0), value]) for name, value in cond.items()}

        def step(x: Floats, sigma: float, _: int) -> Floats:
            doubled = x if uncond is None else np.concatenate([x, x])
            feeds = self.graph.feeds(doubled, sigma, cond)
            v = self.graph.velocity(self.engine.run("transformer", [self.graph.transformer.output], feeds)[0])
            progress.advance()
            return v if uncond is None else guide(v[:rows], v[rows:], weight)

        return step
