"""Cost of compressing encoders and weights: two tables that compare methods, and one of the ingredients of `flashgen quantize`.

    python -m benchmarks.compression artifacts/shapes --page docs/compression.md      # `make compression`

Needs the packages of .venv-peers. Every finished row is saved in the page's JSON, so the same command resumes.
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
from numpy.typing import NDArray
from torch import nn

from benchmarks.compression_page import draw, page
from benchmarks.distribution import Space, frechet_distance, pooled_latents
from benchmarks.peers import bitsandbytes_nf4, nncf_int4, onnxruntime_nbits
from benchmarks.scores import TEST_SEED, keep, replaced_transformer, verdicts
from flashgen import worlds
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.families.base import predict
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.models.sample import decode, latent_shape, sample_latents
from flashgen.pixels import slices
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.stages.base import run
from flashgen.stages.inputs import sampler_of
from flashgen.stages.quantize import Quantize
from flashgen.stages.restructure import RestructureEncoder

PER_TASK, BATCH, ROUNDS = 60, 60, 7
BUDGETS = (3.5, 4.0, 4.25, 4.5)
# Recipe `shapes` has every ingredient at 4.25 mean bits. Table C starts without those in NONE and adds one per row.
NONE = ["quantize.method=rtn", "quantize.low_rank_tolerance=0", "quantize.step_scales=false"]
STEPS: dict[str, list[str]] = {"nearest, 4.25 bits by damage": NONE, "+ GPTQ": NONE[1:], "+ adaLN on a shared basis": NONE[2:]}
FEW = "restructure.iterations=400"
ENCODERS: dict[str, tuple[str, list[str]]] = {
    "zeros": ("zeros", []), "prune": ("prune", []), "adapter": ("prune", ["restructure.adapter=true", FEW]), "compact": ("compact", [FEW]),
    "compact, embedding loss": ("compact", ["restructure.iterations=0"]),
}  # fmt: skip


class Judge:
    """Draws the test prompts with a network and compares the pictures with those of the student in `pipe`."""

    def __init__(self, pipe: Pipeline, sampler: Sampler) -> None:
        self.pipe, self.prompts = pipe, worlds.get("shapes").prompts(TEST_SEED, PER_TASK)
        self.latents, self.pictures = self._draw(pipe.transformer, sampler)
        self.features = pooled_latents(pipe.vae, self.pictures)
        self.space = Space.of(self.features)

    def _draw(self, network: nn.Module, sampler: Sampler) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """(final latents, pictures)."""
        with replaced_transformer(self.pipe, network):
            z = sample_latents(self.pipe, sampler, self.prompts, list(range(len(self.prompts))), BATCH)
        return z, np.concatenate([decode(self.pipe, z[rows]) for rows in slices(len(z), BATCH)])

    def score(self, network: nn.Module, sampler: Sampler) -> dict[str, Any]:
        """Per prompt: verdict, |z - z*|^2 / |z*|^2, PSNR in dB, distance in VAE-PCA64; and FD of the set to the student's pictures."""
        z, images = self._draw(network, sampler)
        features = pooled_latents(self.pipe.vae, images)
        apart = np.linalg.norm(self.space(features) - self.space(self.features), axis=1)
        squares = ((images.astype(float) - self.pictures) ** 2).mean((1, 2, 3))
        return {
            "passed": verdicts(images, self.prompts),
            "latent_error": ((z - self.latents).flatten(1).square().sum(1) / self.latents.flatten(1).square().sum(1)).tolist(),
            "psnr": (10 * np.log10(255**2 / np.maximum(squares, 1e-3))).tolist(),
            "apart": apart.tolist(),
            "fd": frechet_distance(self.space(self.features), self.space(features)),
        }


def _example(pipe: Pipeline, sampler: Sampler) -> dict[str, torch.Tensor]:
    """Inputs of the transformer for one picture."""
    x, sigma = torch.zeros(1, *latent_shape(pipe, sampler.size_px)), torch.full((1,), 0.5)
    return pipe.family.transformer_inputs(x, sigma, encode_prompts(pipe, ["a red circle"], sampler))


def weights(student: Artifact, work: Path, kept: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure the missing rows of tables B and C."""
    pipe, sampler = load_pipeline(student.path), sampler_of(student)
    judged = Judge(pipe, sampler)
    total = sum(layer.weight.numel() for layer in pipe.transformer.modules() if isinstance(layer, nn.Linear))
    example = tuple(_example(pipe, sampler).values())

    def ours(*settings: str) -> tuple[nn.Module, float, Sampler]:
        recipe = load("shapes", ["bench.per_task=0", *settings])
        artifact = run(Quantize, {"student": student.path}, work / "int4", recipe)
        return load_pipeline(artifact.path).transformer, float(artifact.manifest.metrics["packed_bytes"]), sampler_of(artifact)

    def peer(result: tuple[nn.Module, float]) -> tuple[nn.Module, float, Sampler]:
        return (*result, sampler)

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
    """Measure the missing rows of table A, and the latency of a step: one picture, 2 threads, rows interleaved, medians."""
    students = {"full": student}
    for name, (mode, settings) in ENCODERS.items():
        recipe = load("shapes", ["restructure.floor=0", "bench.per_task=0", *settings])
        folder = work.parent / "slim" if name == "prune" else work / name.replace(", ", "-").replace(" ", "-")  # `make shapes` makes slim
        students[name] = run(RestructureEncoder, {"student": student.path}, folder, recipe, mode=mode)
    steps: dict[str, list[float]] = {name: [] for name in students}
    calls: dict[str, Callable[[], object]] = {}
    for name, artifact in students.items():
        sampler, pipe = sampler_of(artifact), load_pipeline(artifact.path)
        judged = Judge(pipe, sampler)
        calls[name] = partial(predict, pipe.transformer, _example(pipe, sampler))
        if name not in kept["encoders"]:
            passed = verdicts(judged.pictures, judged.prompts)
            size = sum(f.size for f in artifact.manifest.files if f.path.startswith("text_encoder"))
            t5 = sum(f.size for f in artifact.manifest.files if f.path.startswith("text_encoder_3/"))
            kept["encoders"][name] = {"passed": passed, "bytes": size, "t5_bytes": t5, "tokens": sum(sampler.tokens.values())}
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
    """Hash of what the rows of each table depend on: student, settings and package versions. A change starts the table anew."""
    packages, recipe = {name: version(name) for name in ("bitsandbytes", "nncf", "onnxruntime", "torch")}, load("shapes")
    given = {"weights": [BUDGETS, STEPS, recipe.quantize.model_dump(), packages], "encoders": [ENCODERS, recipe.restructure.model_dump()]}
    return {table: hash_json([student.manifest.digest, PER_TASK, settings]) for table, settings in given.items()}


def main() -> None:
    """Measure what is missing, then write the page, its numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="artifacts of `make shapes`")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file; numbers and plot are written beside it")
    parser.add_argument("--student", default="finetuned", help="the artifact that is compressed")
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
