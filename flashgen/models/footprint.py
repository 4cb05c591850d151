"""Size of networks and of their passes, from the headers of their files and their configs alone; no weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from flashgen import families
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact
from flashgen.families.base import Family, Forward
from flashgen.families.configs import configs_in
from flashgen.pixels import Size

Parts = dict[str, float]  # bytes by component
LIVE_IMAGES = 3  # tensors of the widest full-size layer that are alive at once in a decoder
KEPT_BY_VAE = 4  # tensors of the size of its first block that are alive at once in the VAE's encoder
PROGRAM = 440 << 20  # python with torch, diffusers and transformers
NOT_LINEAR = re.compile(r"(embedding|shared|embed_tokens|attention_bias)$")


@dataclass(frozen=True)
class Tensors:
    """Shape and bytes per element of every tensor of one component, by name, in the order of its files."""

    entries: dict[str, tuple[tuple[int, ...], int]]

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape, _ in self.entries.values())

    @property
    def bytes(self) -> int:
        """Bytes in the files."""
        return sum(prod(shape) * size for shape, size in self.entries.values())

    @property
    def largest(self) -> int:
        """Number of weights of the largest tensor."""
        return max(prod(shape) for shape, _ in self.entries.values())

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Shape [N, K] of every Linear by name."""
        weights = {n.removesuffix(".weight"): s for n, (s, _) in self.entries.items() if n.endswith(".weight") and len(s) == 2}
        return {name: shape for name, shape in weights.items() if not NOT_LINEAR.search(name)}


class Footprint:
    """Sizes of one diffusers-layout artifact. Raises ArtifactError for missing shards and broken files."""

    def __init__(self, source: Artifact) -> None:
        from flashgen.models.stream import DTYPES, header, weight_files

        assert source.manifest.sampler is not None
        self.family: Family = families.get(source.manifest.family)
        self.sampler: Sampler = source.manifest.sampler
        self.path, self.configs = source.path, configs_in(source.path, self.family)
        self.parts: dict[str, Tensors] = {}
        for part in self.family.networks:
            if (source.path / part).is_dir():
                entries = [(n, e) for path in weight_files(source.path / part) for n, e in header(path)[0].items()]
                self.parts[part] = Tensors({name: (tuple(e["shape"]), DTYPES[e["dtype"]].itemsize) for name, e in entries})

    @property
    def transformer(self) -> Tensors:
        """Tensors of the transformer."""
        return self.parts["transformer"]

    @cached_property
    def tables(self) -> int:
        """Numbers in the transformer's buffers, position tables that nothing learns; each copy of the network has its own."""
        from flashgen.models.networks import empty_network

        return sum(table.numel() for table in empty_network(self.path, "transformer", self.family).buffers())

    @property
    def learnable(self) -> int:
        """Number of the transformer's weights without `tables`."""
        return self.transformer.count - self.tables

    @property
    def decoder(self) -> dict[str, Any]:
        """Sizes of the VAE's decoder, the entry `vae` of a description (`families.graphs`)."""
        tokenizers = [encoder.tokenizer for encoder in self.family.text_encoders.values()]
        described: dict[str, Any] = self.family.description(self.configs, self.sampler, dict.fromkeys(tokenizers, 0))["vae"]
        return described

    @property
    def encoders(self) -> list[str]:
        """Text encoders that the artifact has."""
        return [name for name in self.family.text_encoders if name in self.parts]

    def forward(self, size: Size | None = None) -> Forward:
        """Size of one pass of the transformer over one picture."""
        return self.family.forward_size(self.configs, self.transformer.linears, size or self.sampler.size_px, self.sampler.tokens)

    def is_large(self, encoder: str) -> bool:
        """Return True if a text encoder computes in bf16, and from disk where memory is short."""
        from flashgen.models.networks import LARGE_BYTES

        return self.parts[encoder].bytes > LARGE_BYTES

    def embedding(self, prompts: int, room: float = 0) -> tuple[Parts, float]:
        """Bytes and multiply-adds of encoding prompts: small encoders in fp32, large ones in bf16.

        Large ones that are smaller than `room` bytes are in memory, as on an accelerator; others are there one layer at a time.
        """
        from flashgen.models.prompts import BATCH

        memory, multiply_adds, activations, rows = Parts(program=PROGRAM), 0.0, 0.0, min(BATCH, prompts)
        for name in self.encoders:
            config, part = self.configs(name), self.parts[name]
            tokens, large = self.sampler.tokens[self.family.text_encoders[name].tokens], self.is_large(name)
            size = 2 if large else 4
            memory[name] = part.largest * 2 * size if large and 2 * part.count >= room else float(size * part.count)
            heads, inner, width = (
                int(config.get(key) or config[other])
                for key, other in (("num_heads", "num_attention_heads"), ("d_ff", "intermediate_size"), ("d_model", "hidden_size"))
            )
            scores = rows * heads * tokens**2 * (size + 8)  # and twice in fp32 around the softmax
            activations = max(activations, rows * tokens * width * size * 6 + max(scores, rows * tokens * inner * size * 3))
            multiply_adds += prompts * tokens * sum(prod(shape) for shape in part.linears.values())
        return memory | {"activations": activations}, multiply_adds

    def picture_encoding(self, size: Size) -> tuple[Parts, float]:
        """Bytes and multiply-adds of the VAE's encoder for one picture, in fp32."""
        halvings, multiply_adds, width = self.family.vae_factor(self.configs).bit_length() - 1, 0.0, 0
        for name, (shape, _) in self.parts["vae"].entries.items():
            if name.startswith("encoder.") and len(shape) == 4:
                block = re.match(r"encoder\.down_blocks\.(\d+)\.(downsamplers)?", name)
                level = int(block[1]) + bool(block[2]) if block else 0 if "conv_in" in name else halvings
                multiply_adds += prod(shape) * prod(size) / 4**level
                width = max(width, 0 if level else shape[0])
        activations = 4.0 * KEPT_BY_VAE * width * prod(size)
        return {"vae": 4.0 * self.parts["vae"].count, "activations": activations}, multiply_adds

    def conditioning_bytes(self) -> int:
        """Bytes of disk per prompt while a stage trains: bf16 where an encoder is large (`training.prompts`), else fp32."""
        size = 2 if any(map(self.is_large, self.encoders)) else 4
        return size * self.family.conditioning_numbers(self.configs, self.sampler.tokens)
