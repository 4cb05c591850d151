"""What encoders and weights may lose: two tables of peers, one of our own ingredients.

    python -m benchmarks.compression artifacts/shapes --page docs/compression.md      # `make compression`

Needs the peers of .venv-peers. Every finished row is kept in the page's JSON, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import nn

from benchmarks.compression_page import draw, page
from benchmarks.peers import bitsandbytes_nf4, nncf_int4, onnxruntime_nbits
from benchmarks.scores import TEST_SEED, keep
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device.sampler import slices
from flashgen.metrics.distribution import Space, frechet_distance, pooled_latents
from flashgen.models.sample import decode, latent_shape, load_pipeline, sample_latents
from flashgen.models.text import encode_prompts
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.shapes.scene import prompt_set
from flashgen.shapes.verify import judge
from flashgen.stages import quantize, restructure

PER_TASK, BATCH, ROUNDS = 60, 60, 7
BUDGETS = (3.5, 4.0, 4.25, 4.5)
# Recipe `shapes` has every ingredient at 4.25 mean bits. Table C: without those that are named here, one more added a row.
NONE = ["quantize.method=rtn", "quantize.basis_tolerance=0", "quantize.repair=false"]
STEPS: dict[str, list[str]] = {"nearest, 4.25 bits by damage": NONE, "+ GPTQ": NONE[1:], "+ adaLN on a shared basis": NONE[2:]}
FEW = "restructure.iterations=400"
ENCODERS: dict[str, tuple[str, list[str]]] = {
    "zeros": ("zeros", []), "prune": ("prune", []), "adapter": ("prune", ["restructure.adapter=true", FEW]), "compact": ("compact", [FEW]),
    "compact, embedding loss": ("compact", ["restructure.iterations=0"]),
}  # fmt: skip


class Judge:
    """Draws the test prompts with a network and compares with the student's own pictures."""

    def __init__(self, pipe: StableDiffusion3Pipeline, sampler: Sampler) -> None:
        self.pipe, self.requests = pipe, prompt_set(TEST_SEED, PER_TASK)
        self.captions = [request.caption() for request in self.requests]
        self.whole = self._draw(pipe.transformer, sampler)
        self.features = pooled_latents(pipe.vae, self.whole[1])
        self.space = Space.of(self.features)

    def _draw(self, network: nn.Module, sampler: Sampler) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """(final latents, pictures)."""
        own, self.pipe.transformer = self.pipe.transformer, network
        try:
            z = sample_latents(self.pipe, sampler, self.captions, list(range(len(self.captions))), BATCH)
        finally:
            self.pipe.transformer = own
        return z, np.concatenate([decode(self.pipe, z[rows]) for rows in slices(len(z), BATCH)])

    def score(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Prompt by prompt: verdict, |z - z*|^2 / |z*|^2, PSNR in dB, distance in VAE-PCA64; and FD of all to the student's own."""
        z, images = self._draw(network, sampler)
        own_z, own = self.whole
        features = pooled_latents(self.pipe.vae, images)
        apart = np.linalg.norm(self.space(features) - self.space(self.features), axis=1)
        squares = ((images.astype(float) - own) ** 2).mean((1, 2, 3))
        return {
            "passed": [int(judge(image, request).passed) for image, request in zip(images, self.requests, strict=True)],
            "latent_error": ((z - own_z).flatten(1).square().sum(1) / own_z.flatten(1).square().sum(1)).tolist(),
            "psnr": (10 * np.log10(255**2 / np.maximum(squares, 1e-3))).tolist(),
            "apart": apart.tolist(),
            "fd": frechet_distance(self.space(self.features), self.space(features)),
        }


def _example(pipe: StableDiffusion3Pipeline, sampler: Sampler) -> tuple[torch.Tensor, ...]:
    """Inputs of the transformer for one picture."""
    cond = encode_prompts(pipe, ["a red circle"], sampler.t5_tokens)
    return torch.zeros(1, *latent_shape(pipe, sampler.size_px)), cond.embeds, cond.pooled, torch.full((1,), 500.0)


def weights(student: Artifact, work: Path, kept: dict[str, Any], save: Callable[[], None]) -> None:
    """Tables B and C."""
    pipe = load_pipeline(student.path)
    sampler = student.manifest.sampler
    assert sampler is not None
    judged = Judge(pipe, sampler)
    total = sum(layer.weight.numel() for layer in pipe.transformer.modules() if isinstance(layer, nn.Linear))
    example = _example(pipe, sampler)

    def ours(*settings: str) -> tuple[nn.Module, float, Sampler]:
        recipe = load("shapes", ["bench.per_task=0", *settings])
        made = quantize.run(str(student.path), work / "int4", recipe, 0, False)
        assert made.manifest.sampler is not None
        return load_pipeline(made.path).transformer, float(made.manifest.metrics["packed_bytes"]), made.manifest.sampler

    def peer(made: tuple[nn.Module, float]) -> tuple[nn.Module, float, Sampler]:
        return (*made, sampler)

    rows: dict[str, Callable[[], tuple[nn.Module, float, Sampler]]] = {
        "student, fp32": lambda: (pipe.transformer, 4.0 * total, sampler),
        "ONNX Runtime, default": lambda: peer(onnxruntime_nbits(pipe, sampler, "default", work / "onnx")),
        "ONNX Runtime, HQQ": lambda: peer(onnxruntime_nbits(pipe, sampler, "hqq", work / "onnx")),
        "ONNX Runtime, k_quant": lambda: peer(onnxruntime_nbits(pipe, sampler, "k_quant", work / "onnx")),
        "NNCF INT4": lambda: peer(nncf_int4(pipe.transformer, example)),
        "bitsandbytes NF4": lambda: peer(bitsandbytes_nf4(pipe.transformer)),
        "round to nearest, 4 bits": lambda: ours("quantize.budget=null", *NONE),
        **{f"flashgen, {bits} bits": partial(ours, f"quantize.budget={bits}") for bits in BUDGETS},
        **{name: partial(ours, *settings) for name, settings in STEPS.items()},
    }
    for name, make in rows.items():
        if name not in kept["weights"]:
            start = time.monotonic()
            network, size, how = make()
            kept["weights"][name] = {"bytes": size, "mean_bits": 8 * size / total, **judged.score(network, how)}
            save()
            row = kept["weights"][name]
            say(f"{name}: {row['mean_bits']:.2f} bits, latent error {np.mean(row['latent_error']):.4f}, "
                f"composition {np.mean(row['passed']):.3f}, {time.monotonic() - start:.0f} s")  # fmt: skip


def encoders(student: Artifact, work: Path, kept: dict[str, Any], save: Callable[[], None]) -> None:
    """Table A. Step latency: one picture, 2 threads, rows interleaved, medians."""
    made = {"full": student}
    for name, (mode, settings) in ENCODERS.items():
        recipe: Recipe = load("shapes", ["restructure.floor=0", "bench.per_task=0", *settings])
        folder = work.parent / "slim" if name == "prune" else work / name.replace(", ", "-").replace(" ", "-")  # slim is of `make shapes`
        made[name] = restructure.run(str(student.path), folder, recipe, 0, False, mode)
    steps: dict[str, list[float]] = {name: [] for name in made}
    calls: dict[str, Callable[[], object]] = {}
    for name, artifact in made.items():
        sampler, pipe = artifact.manifest.sampler, load_pipeline(artifact.path)
        assert sampler is not None
        judged = Judge(pipe, sampler)
        calls[name] = partial(pipe.transformer, *_example(pipe, sampler))
        if name not in kept["encoders"]:
            passed = [int(judge(image, request).passed) for image, request in zip(judged.whole[1], judged.requests, strict=True)]
            size = sum(f.size for f in artifact.manifest.files if f.path.startswith("text_encoder"))
            t5 = sum(f.size for f in artifact.manifest.files if f.path.startswith("text_encoder_3/"))
            kept["encoders"][name] = {"passed": passed, "bytes": size, "t5_bytes": t5, "tokens": sampler.clip_tokens + sampler.t5_tokens}
            save()
            say(f"{name}: composition {np.mean(passed):.3f}")
    torch.set_num_threads(2)
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(10):
                    call()
                steps[name].append((time.perf_counter() - start) / 10)
    for name, times in steps.items():
        ratio = [mine / full for mine, full in zip(times[1:], steps["full"][1:], strict=True)]
        kept["encoders"][name] |= {"step_ms": 1000 * float(np.median(times[1:])), "step_ratio": float(np.median(ratio))}
    save()


def made_from(student: Artifact) -> dict[str, str]:
    """What the rows of each table depend on: the student, the settings, the peers' versions. A change of it starts the table anew."""
    packages, recipe = {name: version(name) for name in ("bitsandbytes", "nncf", "onnxruntime", "torch")}, load("shapes")
    given = {"weights": [BUDGETS, STEPS, recipe.quantize.model_dump(), packages], "encoders": [ENCODERS, recipe.restructure.model_dump()]}
    return {table: hash_json([student.manifest.digest, PER_TASK, settings]) for table, settings in given.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="artifacts of `make shapes`")
    parser.add_argument("--page", type=Path, required=True, help="Markdown; raw numbers beside it as .json, the plot as .png")
    parser.add_argument("--student", default="finetuned", help="which of them is compressed")
    given = parser.parse_args()
    student = open_artifact(given.folder / given.student, ("student",))
    path, keys = given.page.with_suffix(".json"), made_from(student)
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"keys": {}}
    kept |= {table: {} for table, key in keys.items() if kept["keys"].get(table) != key} | {"keys": keys}

    save = partial(keep, path, kept)
    work = given.folder / "compression"
    weights(student, work, kept, save)
    encoders(student, work, kept, save)
    draw(kept, given.page.with_suffix(".png"))
    given.page.write_text(page(kept, given.page.with_suffix(".png").name) + "\n")


if __name__ == "__main__":
    main()
