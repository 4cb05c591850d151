"""Batches and tiles that fit a memory budget: how many pictures pass a network together, and whether the decoder works in tiles.

Needs are estimated from the sizes of files and the shapes in the artifact's description, with factors measured at SD3.5-Medium's size
(docs/fullsize.md). Networks are in memory one at a time, so the largest of them decides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from flashgen.artifact.store import Artifact
from flashgen.device.graph import Graph, read_graph
from flashgen.device.providers import target_of
from flashgen.device.wide import is_roomy
from flashgen.errors import MachineError
from flashgen.runtime.memory import gigabytes, resident_bytes, total_bytes

DECODE_BYTES = 2e9  # for the decoder's activations when no budget is given
TILES = (64, 48, 32, 24, 16)  # largest sides of a tile in latents; diffusers uses 64 for SD3
LIBRARY = {"onnxruntime": 40e6, "openvino": 140e6}  # bytes of the engine's code; OpenVINO's include onnxruntime's, for text encoders
LOADED = 2.25  # peak bytes of memory per byte of file while a network is loaded
MAPPED = 1.05  # the same for quantized layers that onnxruntime computes with as they lie in the file (docs/fullsize.md)
UNPACKED = 4.75  # the same for a VAE: 16 bits in the file, fp32 in memory and a second copy for convolutions
WIDTHS = 25  # live fp32 vectors of a text encoder's width per token
FUSED_WIDTHS = 71  # the same for the transformer: its attention is fused, so that nothing grows with the square of the tokens
IMAGES = 3.0  # live fp32 images of `vae.channels` channels in the decoder's widest full-size layer


@dataclass(frozen=True)
class Plan:
    """Pictures per step (`batch`) and decoded together (`rows`); sides of a tile in latents (None: no tiles); `peak` bytes in `where`."""

    batch: int
    rows: int
    tile: int | None
    peak: float
    where: str

    def __str__(self) -> str:
        """The plan in words."""
        how = "decoded whole" if self.tile is None else f"decoded in tiles of {self.tile} latents"
        return f"at most about {gigabytes(self.peak)} in {self.where}; batch {self.batch}, {how}"


class Needs:
    """Estimated bytes of this process while it draws `count` pictures of one artifact on `engine`; `compact` as in `engine.Choice`."""

    def __init__(
        self,
        artifact: Artifact,
        engine: str,
        count: int,
        guided: bool = False,
        preview: bool = False,
        init: bool = False,
        compact: bool = False,
    ) -> None:
        self.graph: Graph = read_graph(artifact)
        self._passes, self._init = 2 if guided else 1, init
        self._loaded = dict.fromkeys(("transformer", "vae_decoder", "vae_encoder"), 0.0)
        extra, quantized = artifact.manifest.extra, bool(artifact.manifest.metrics.get("quantized_layers"))
        mapped = quantized and extra.get("accuracy_level") != 4 and engine == "onnxruntime"
        wide = quantized and not compact and target_of(engine).engine == "openvino" and is_roomy(artifact)
        for file in artifact.manifest.files:
            part, _, name = file.path.partition("/")
            if name.startswith("model.onnx"):
                factor = UNPACKED if part.startswith("vae") else LOADED
                if mapped and part == "transformer" and name != "model.onnx":
                    factor = MAPPED
                if wide and part == "transformer":
                    factor = 2 * LOADED
                self._loaded[part] = self._loaded.get(part, 0) + factor * file.size
        _, self._height, self._width = self.graph.latent_shape
        self.side = max(self._height, self._width)
        pixels = self._height * self._width * self.graph.vae.factor**2
        text = sum(self.graph.extent(name).numbers for name in self.graph.conditioning)
        self._base = (
            resident_bytes() + LIBRARY[target_of(engine).engine] + count * (8 * text + 15 * pixels)
        )  # 15: three channels as float and as byte
        self._viewer = self._loaded["vae_decoder"] + self._activations(1, self.side) if preview else 0.0

    def _activations(self, rows: int, tile: int) -> float:
        latents, vae = min(tile, self._height) * min(tile, self._width), self.graph.vae
        return rows * (latents * vae.factor**2 * vae.channels * 4 * IMAGES + latents**2 * (8 if vae.attention else 0))

    def decoding(self, rows: int, tile: int) -> float:
        """Bytes while `rows` pictures are decoded together in tiles of at most `tile` latents a side."""
        return self._base + self._loaded["vae_decoder"] + self._activations(rows, tile)

    def drawing(self, batch: int) -> dict[str, float]:
        """Bytes while each network but the decoder runs."""
        bytes_by_part = {
            encoder.component: self._base + self._loaded[encoder.component] + 4 * batch * encoder.length * encoder.width * WIDTHS
            for encoder in self.graph.encoders
        }
        row = self.graph.transformer.tokens * self.graph.transformer.width * FUSED_WIDTHS
        bytes_by_part["transformer"] = self._base + self._loaded["transformer"] + self._viewer + 4 * batch * self._passes * row
        if self._init:
            bytes_by_part["vae_encoder"] = self._base + self._loaded["vae_encoder"] + self._activations(1, self.side)
        return bytes_by_part


def plan(artifact: Artifact, engine: str, count: int, batch: int, budget: float | None = None, **asked: bool) -> Plan:
    """The largest batch up to `batch` within `budget` bytes, by default within the memory of this machine or its container.

    Without a budget a large decoder is cut before it fills the machine, and one picture is always tried. `asked` are the flags of `Needs`.
    Raises MachineError when not even one picture, decoded in the smallest tiles, fits a budget.
    """
    needs, machine = Needs(artifact, engine, count, compact=budget is not None, **asked), total_bytes() or math.inf
    batch = min(batch, count)
    limit = min(needs.decoding(0, 0) + DECODE_BYTES, machine) if budget is None else budget
    rows = next((rows for rows in range(batch, 0, -1) if needs.decoding(rows, needs.side) <= limit), 0)
    tile = None if rows else next((tile for tile in TILES if tile < needs.side and needs.decoding(1, tile) <= limit), None)
    smallest = min(needs.side, TILES[-1])
    room = machine if budget is None else budget
    batch = next((b for b in range(batch, 0, -1) if max(needs.drawing(b).values()) <= room), 0)
    if budget is not None and (not batch or not (rows or tile)):
        all_needs = needs.drawing(1) | {"vae_decoder": needs.decoding(1, smallest)}
        where = max(all_needs, key=lambda part: all_needs[part])
        raise MachineError(
            f"--memory {gigabytes(budget)} is too little for {artifact.path}: its {where} needs about {gigabytes(all_needs[where])} "
            f"for one picture; --memory {gigabytes(all_needs[where] + 0.01e9)} would do"
        )
    batch = batch or 1
    if not rows:
        tile = tile or smallest
    stages = needs.drawing(batch) | {"vae_decoder": needs.decoding(rows or 1, tile or needs.side)}
    where = max(stages, key=lambda part: stages[part])
    return Plan(batch, rows or 1, tile, stages[where], where)


def smaller_tile(tile: int | None, side: int) -> int | None:
    """The next smaller tile after `tile` (None: the whole picture, `side` latents); None if there is none."""
    return next((t for t in TILES if t < (tile or side)), None)


def out_of_memory(error: Exception) -> bool:
    """Return True if an engine failed for lack of memory, which onnxruntime and OpenVINO report in words only."""
    words = r"(?i)bad_?\s?alloc|out of memory|failed to allocate|not enough memory"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None
