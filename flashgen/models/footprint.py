"""What networks hold and do, from the headers of their files and their configs alone: tensors, one pass, embedding prompts.

No weight is read, and nothing of torch imported before it is needed: stages plan before they say "up to date".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from flashgen.artifact.store import Artifact
from flashgen.models.specs import ENCODERS

Parts = dict[str, float]  # bytes by component
PROGRAM = 440 << 20  # python with torch, diffusers and transformers


@dataclass(frozen=True)
class Tensors:
    """Of one component, in the order of its files: shape and bytes an element by name."""

    found: dict[str, tuple[tuple[int, ...], int]]

    @property
    def count(self) -> int:
        return sum(prod(shape) for shape, _ in self.found.values())

    @property
    def bytes(self) -> int:
        return sum(prod(shape) * size for shape, size in self.found.values())

    @property
    def largest(self) -> int:
        return max(prod(shape) for shape, _ in self.found.values())

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        found = {n.removesuffix(".weight"): s for n, (s, _) in self.found.items() if n.endswith(".weight") and len(s) == 2}
        return {name: shape for name, shape in found.items() if not re.search(r"(embedding|shared|embed_tokens|attention_bias)$", name)}


def tensors(source: Artifact) -> dict[str, Tensors]:
    """Raises ArtifactError for shards that are missing and files of another world."""
    from flashgen.models.stream import DTYPES, header, weight_files

    found = {}
    for part in ("transformer", "vae", *ENCODERS):
        if (source.path / part).is_dir():
            entries = [(n, e) for path in weight_files(source.path / part) for n, e in header(path)[0].items()]
            found[part] = Tensors({name: (tuple(e["shape"]), DTYPES[e["dtype"]].itemsize) for name, e in entries})
    return found


class Forward(NamedTuple):
    """One pass of the transformer over one picture."""

    tokens: int
    width: int
    blocks: int
    adds: float
    latent: int  # numbers of the picture in latent space

    @property
    def hidden(self) -> int:
        return self.tokens * self.width


def forward(source: Artifact, transformer: Tensors, size_px: int | None = None) -> Forward:
    config = json.loads((source.path / "transformer" / "config.json").read_text())
    sampler = source.manifest.sampler
    assert sampler is not None
    side = (size_px or sampler.size_px) // 8
    image = (side // int(config["patch_size"])) ** 2
    text = sampler.clip_tokens + sampler.t5_tokens
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    adds = 0.0
    for name, shape in transformer.linears.items():
        once = re.search(r"norm|time_text_embed", name)  # on one vector, not on tokens
        adds += prod(shape) * (1 if once else text if re.search(r"context|add_", name) else image)
    dual = len(config.get("dual_attention_layers", ()))
    adds += 2 * width * (int(config["num_layers"]) * (image + text) ** 2 + dual * image**2)
    return Forward(image + text, width, int(config["num_layers"]), adds, int(config["in_channels"]) * side**2)


def embedding(source: Artifact, parts: dict[str, Tensors], prompts: int) -> tuple[Parts, float]:
    """Bytes and multiply-adds: small encoders in fp32, of large ones a layer at a time in bf16."""
    from flashgen.models.text import BATCH, LARGE

    sampler = source.manifest.sampler
    assert sampler is not None
    found, adds, activations = Parts(program=PROGRAM), 0.0, 0.0
    for name in (n for n in ENCODERS if n in parts):
        config = json.loads((source.path / name / "config.json").read_text())
        t5 = name == "text_encoder_3"
        large = parts[name].bytes > LARGE
        tokens, rows, size = sampler.t5_tokens if t5 else sampler.clip_tokens, min(BATCH, prompts), 2 if large else 4
        found[name] = parts[name].largest * 2 * size if large else 4.0 * parts[name].count
        scores = rows * config["num_heads"] * tokens**2 * (size + 8) if t5 else 0  # twice in fp32 around T5's softmax
        inner = rows * tokens * (config["d_ff"] if t5 else config["intermediate_size"]) * size * 3
        hidden = rows * tokens * (config["d_model"] if t5 else config["hidden_size"]) * size * 6
        activations = max(activations, hidden + max(scores, inner))
        adds += prompts * tokens * sum(prod(shape) for shape in parts[name].linears.values())
    return found | {"activations": activations}, adds


def embedded(source: Artifact, parts: dict[str, Tensors]) -> int:
    """Bytes of disk that a prompt takes while a stage trains: its tokens, in bf16 where an encoder is large (`prompt_pool`)."""
    from flashgen.models.text import LARGE

    config, sampler = json.loads((source.path / "transformer" / "config.json").read_text()), source.manifest.sampler
    assert sampler is not None
    size = 2 if any(parts[name].bytes > LARGE for name in ENCODERS if name in parts) else 4
    return size * (int(config["joint_attention_dim"]) * (sampler.clip_tokens + sampler.t5_tokens) + int(config["pooled_projection_dim"]))
