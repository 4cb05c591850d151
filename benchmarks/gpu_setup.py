"""Shared by the parts of `benchmarks.gpu`: sizes, random networks on the device, a teacher without numbers, clocks and memory."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn

from flashgen import __version__, families
from flashgen.artifact.manifest import Manifest
from flashgen.artifact.store import Artifact
from flashgen.families.base import Family
from flashgen.families.conditioning import Conditioning
from flashgen.families.sd3.build import networks, scheduler, tokenizers
from flashgen.families.sd3.sampling import random_sampler
from flashgen.families.sd3.specs import spec
from flashgen.families.sd3.text import shares
from flashgen.families.sd3.tokenizers import COMMON_WORDS
from flashgen.models.save import write_index
from flashgen.pixels import Size
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.runtime.memory import peak_rss_mib
from flashgen.training.prompts import PromptPool

PROMPTS = 64  # distinct random embeddings
STEPS = 4  # of the student


@dataclass(frozen=True)
class Sizes:
    """How much a run measures: the architecture, sizes of pictures, and settings on top of the recipes that it trains with."""

    like: str
    sizes_px: tuple[int, int]  # (of the passes and the LoRA round, of full training); drawing has both
    batches: tuple[int, ...]  # of the passes
    micro_batches: tuple[int, ...]  # of full training
    rank: int
    repeats: int
    lora: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    precision: str = "bfloat16"

    def recipe(self, name: str, *settings: str) -> Recipe:
        """The recipe called `name` with `settings`, in this run's precision."""
        return load(name, [f"compute.precision={self.precision}", "bench.per_task=0", *settings])


SD35_MEDIUM = Sizes("sd35-medium", (512, 1024), (1, 4, 16), (1, 2, 3, 4), 64, 5)
SMALL = ("distill.lora.rank=4", "distill.size_px=64", "distill.matching.batch=4", "compute.micro_batch=2")
TINY = Sizes("tiny", (64, 128), (1, 2), (1, 2), 4, 2, SMALL)


@dataclass(frozen=True)
class Bench:
    """One run: where it computes, how much it measures, a folder for its files, and the device's peak in FLOP/s (None: unknown)."""

    device: torch.device
    sizes: Sizes
    folder: Path
    peak: float | None

    @property
    def family(self) -> Family:
        """SD3's."""
        return families.get("sd3")

    def teacher(self) -> Artifact:
        """A teacher whose files have headers and no numbers: what plans, configs and loading of text encoders need, without disk.

        The files are sparse, and what is read from them is 0.
        """
        shapes, folder = spec(self.sizes.like), self.folder / "teacher"
        manifest = Manifest(
            kind="teacher", world="shapes", stage="teacher", version="v0001", created=datetime.now(UTC).isoformat(),
            flashgen_version=__version__, recipe={}, seed=0, parents=[], packages={}, sampler=random_sampler(shapes), metrics={}, extra={},
            files=[],
        ).sealed()  # fmt: skip
        if not folder.exists():
            tokens = tokenizers(shapes, COMMON_WORDS)
            with torch.device("meta"):
                empty = networks(shapes, len(tokens["tokenizer"]), len(tokens["tokenizer_3"]))
            for name, network in empty.items():
                (folder / name).mkdir(parents=True)
                of_diffusers = name in ("transformer", "vae")
                (network.save_config if of_diffusers else network.config.save_pretrained)(folder / name)
                _write_header(network, folder / name / f"{'diffusion_pytorch_model' if of_diffusers else 'model'}.safetensors")
            for name, part in {**tokens, "scheduler": scheduler()}.items():
                part.save_pretrained(folder / name)
                empty[name] = part
            write_index(folder, "StableDiffusion3Pipeline", empty)
        return Artifact(folder, manifest)

    def transformer(self, dtype: torch.dtype) -> nn.Module:
        """The transformer with random weights."""
        return self._random(lambda: SD3Transformer2DModel(**spec(self.sizes.like).transformer), dtype)

    def vae(self) -> nn.Module:
        """The autoencoder with random weights, in fp32."""
        return self._random(lambda: AutoencoderKL(**spec(self.sizes.like).vae), torch.float32)

    def _random(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device if self.device.type == "cuda" else "cpu"):  # initialising 2.5 G weights on the CPU takes a minute
            network = make()
        return network.to(self.device, dtype).eval().requires_grad_(False)

    def pool(self) -> PromptPool:
        """Random embeddings, of the shapes and on the side of the bus on which a stage has those of its prompts."""
        shapes, g = spec(self.sizes.like), torch.Generator().manual_seed(0)
        width, pooled = shapes.transformer["joint_attention_dim"], shapes.transformer["pooled_projection_dim"]
        tokens = shapes.clip_tokens + shapes.t5_tokens
        widths = shapes.clip_l["hidden_size"], shapes.clip_g["hidden_size"]
        made = {"embeds": torch.randn(PROMPTS + 1, tokens, width, generator=g), "pooled": torch.randn(PROMPTS + 1, pooled, generator=g)}
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}
        cond = Conditioning(self.family, tensors, shares(shapes.clip_tokens, *widths, shapes.clip_l["projection_dim"]))
        return PromptPool(cond[slice(PROMPTS)], cond[slice(PROMPTS, None)]).on(self.device)

    def shape(self, side_px: int) -> tuple[int, int, int]:
        """(channels, height, width) of latents."""
        shapes = spec(self.sizes.like)
        configs = {"transformer": shapes.transformer, "vae": shapes.vae}
        return self.family.latent_shape(configs.__getitem__, Size(side_px, side_px))

    def share(self, flop_per_s: float) -> float | None:
        """Share of the device's peak, or None where that is not known."""
        return flop_per_s / self.peak if self.peak else None

    def synchronise(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[int], Any], repeats: int, warmup: int = 1) -> list[float]:
        """Seconds of `run(index)` by the device's events (elsewhere by the clock), after `warmup` runs."""
        found = []
        for index in range(warmup + repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
                start.record()
                run(index)
                end.record()
                end.synchronize()
                lap = start.elapsed_time(end) / 1e3
            else:
                started = time.perf_counter()
                run(index)
                lap = time.perf_counter() - started
            found += [lap] if index >= warmup else []
        return found

    def forget_peak(self) -> None:
        """Free what is unused and start counting the peak of the device's memory anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Largest memory of tensors on the device since `forget_peak`; None for devices that do not count it."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def summary(laps: Sequence[float]) -> dict[str, float]:
    """Median and spread, (largest - smallest) / median."""
    ordered = sorted(laps)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"seconds": middle, "spread": (ordered[-1] - ordered[0]) / middle}


def host_gib() -> float | None:
    """Peak memory of this process on the host."""
    peak = peak_rss_mib()
    return None if peak is None else peak / 1024


def difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _write_header(network: nn.Module, path: Path) -> None:
    """A safetensors file in bf16 whose header has the tensors of `network` and whose data is a hole."""
    entries: dict[str, Any] = {}
    offset, tied = 0, set(getattr(network, "_tied_weights_keys", None) or ())
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and name not in tied:
            entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + 2 * tensor.numel()]}
            offset += 2 * tensor.numel()
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + offset)
