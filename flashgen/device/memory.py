"""Memory as a budget: how many pictures go through a network together, and whether the decoder works in tiles.

Needs are estimated from file sizes and shapes, with factors measured at SD3.5-Medium's size
(docs/fullsize.md). Networks are in memory one at a time, so the largest of them decides.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashgen.artifact.store import Artifact
from flashgen.errors import MachineError, UsageError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DECODE_BYTES = 2e9  # for the decoder's activations when no budget is given
TILES = (64, 48, 32, 24, 16)  # latents a side; diffusers cuts SD3's in 64
LIBRARY = {"onnxruntime": 40e6, "openvino": 140e6}  # bytes of the engine itself, of both: text encoders stay on onnxruntime
LOADED = 2.25  # bytes in memory for a byte of file, at their peak while loading
MAPPED = 1.05  # the same where onnxruntime computes with the codes as they lie in the file (docs/fullsize.md)
UNPACKED = 4.75  # the same of a VAE: 16 bits in the file, in fp32 and packed again for its convolutions
WIDTHS = 25  # live fp32 vectors of the width of a text encoder for each token
FUSED_WIDTHS = 71  # the same of the transformer, whose attention is fused: nothing grows with the square of the tokens
IMAGES = 3.0  # live fp32 images of block_out_channels[1] channels at full size


@dataclass(frozen=True)
class Plan:
    """`batch` pictures a step, `rows` decoded together, in tiles of `tile` latents a side (None: whole); `peak` bytes in `where`."""

    batch: int
    rows: int
    tile: int | None
    peak: float
    where: str

    def __str__(self) -> str:
        how = "decoded whole" if self.tile is None else f"decoded in tiles of {self.tile} latents"
        return f"at most about {gigabytes(self.peak)} in {self.where}; batch {self.batch}, {how}"


def parse_bytes(text: str) -> float:
    """`900MB` or `1.5GiB` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"--memory {text}: write a number and a unit, as in --memory 2GB or 900MiB")
    return float(found[1]) * UNITS[found[2].upper()]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}GB"


class Needs:
    """Estimated bytes of this process while it draws `count` pictures of one artifact on `engine`."""

    def __init__(
        self, artifact: Artifact, engine: str, count: int, guided: bool = False, preview: bool = False, init: bool = False
    ) -> None:
        extra, sampler = artifact.manifest.extra, artifact.manifest.sampler
        assert sampler is not None
        self._path, self._passes, self._init = artifact.path, 2 if guided else 1, init
        self._loaded: dict[str, float] = {}
        codes = bool(artifact.manifest.metrics.get("quantized_layers")) and extra.get("accuracy_level") != 4 and engine == "onnxruntime"
        for file in artifact.manifest.files:
            part, _, name = file.path.partition("/")
            if name.startswith("model.onnx"):
                own = UNPACKED if part.startswith("vae") else LOADED
                factor = MAPPED if codes and part == "transformer" and name != "model.onnx" else own
                self._loaded[part] = self._loaded.get(part, 0) + factor * file.size
        self.side = int(extra["latent_shape"][1])
        self._lengths = {name.replace("tokenizer", "text_encoder"): int(spec["length"]) for name, spec in extra["tokenizers"].items()}
        self._tokens = sampler.clip_tokens + sampler.t5_tokens
        pictures = 15 * sampler.size_px**2  # three channels as float and as a byte
        self._base: float = resident_bytes() + LIBRARY[engine] + count * (8 * self._tokens * extra["joint_dim"] + pictures)
        config = self._config("vae_decoder")
        self._image = float(4 * config["block_out_channels"][1] * IMAGES * (sampler.size_px / self.side) ** 2)
        self._scores = 8.0 if config["mid_block_add_attention"] else 0.0
        self._viewer = self._loaded["vae_decoder"] + self.decode_activations(1, self.side) if preview else 0.0

    def _config(self, part: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self._path / part / "config.json").read_text())
        return config

    def decode_activations(self, rows: int, tile: int) -> float:
        return rows * (tile**2 * self._image + tile**4 * self._scores)

    def decoding(self, rows: int, tile: int) -> float:
        return self._base + self._loaded["vae_decoder"] + self.decode_activations(rows, tile)

    def drawing(self, batch: int) -> dict[str, float]:
        """Bytes while each network but the decoder runs."""
        found = {}
        for part, tokens in ((p, n) for p, n in self._lengths.items() if p in self._loaded):
            config = self._config(part)
            width = config.get("hidden_size") or config["d_model"]
            found[part] = self._base + self._loaded[part] + 4 * batch * tokens * width * WIDTHS
        config = self._config("transformer")
        tokens, heads = (self.side // config["patch_size"]) ** 2 + self._tokens, config["num_attention_heads"]
        row = tokens * heads * config["attention_head_dim"] * FUSED_WIDTHS
        found["transformer"] = self._base + self._loaded["transformer"] + self._viewer + 4 * batch * self._passes * row
        if self._init:
            found["vae_encoder"] = self._base + self._loaded["vae_encoder"] + self.decode_activations(1, self.side)
        return found


def plan(artifact: Artifact, engine: str, count: int, batch: int, budget: float | None = None, **asked: bool) -> Plan:
    """The largest batch up to `batch` that stays within `budget` bytes, or the batch as it is without one; `asked` as `Needs` takes it.

    Raises MachineError when not even one picture, decoded in the smallest tiles, fits.
    """
    needs = Needs(artifact, engine, count, **asked)
    batch = min(batch, count)
    limit = needs.decoding(0, 0) + DECODE_BYTES if budget is None else budget
    rows = next((rows for rows in range(batch, 0, -1) if needs.decoding(rows, needs.side) <= limit), 0)
    tile = None if rows else next((tile for tile in TILES if tile < needs.side and needs.decoding(1, tile) <= limit), None)
    smallest = min(needs.side, TILES[-1])
    if budget is not None:
        batch = next((b for b in range(batch, 0, -1) if max(needs.drawing(b).values()) <= budget), 0)
        if not batch or not (rows or tile):
            all_needs = needs.drawing(1) | {"vae_decoder": needs.decoding(1, smallest)}
            where = max(all_needs, key=lambda part: all_needs[part])
            raise MachineError(
                f"--memory {gigabytes(budget)} is too little for {artifact.path}: its {where} needs about {gigabytes(all_needs[where])} "
                f"for one picture; --memory {gigabytes(all_needs[where] + 0.01e9)} would do"
            )
    if not rows:
        tile = tile or smallest
    stages = needs.drawing(batch) | {"vae_decoder": needs.decoding(rows or 1, tile or needs.side)}
    where = max(stages, key=lambda part: stages[part])
    return Plan(batch, rows or 1, tile, stages[where], where)


def smaller_tile(tile: int | None, side: int) -> int | None:
    """The next size to try where `tile` (None: the whole side) did not fit; None when there is none."""
    return next((t for t in TILES if t < (tile or side)), None)


def out_of_memory(error: Exception) -> bool:
    """Whether an engine failed for memory; they say it in words only."""
    words = r"(?i)bad_?\s?alloc|out of memory|failed to allocate|not enough memory"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def resident_bytes() -> float:
    """Of this process now; the size of a Python with numpy and an engine where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024
    except (OSError, StopIteration):
        return 150e6
