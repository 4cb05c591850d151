"""The bars of `make demo`: measured on artifacts/demo, printed as a table, written to bench/bars.json.

python -m benchmarks.bars artifacts/demo
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks.scores import Bar, report
from flashgen import worlds
from flashgen.artifact.store import open_artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import latent_shape, sample
from flashgen.noise import latents
from flashgen.stages.inputs import sampler_of

PROMPT = "two red circles on a white background"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of 8-bit pictures in dB; 99 for equal ones."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def seconds(*arguments: str, repeats: int = 5) -> float:
    """Median wall time of a `python -m flashgen` process from start to end."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flashgen", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def in_diffusers(path: Path, prompts: list[str], **parts: Any) -> float:
    """Lowest PSNR between flashgen's pictures of a student and those of diffusers with the documented call; `parts` replace components."""
    source = open_artifact(path)
    sampler, loaded = sampler_of(source), load_pipeline(source.path)
    ours, shape = sample(loaded, sampler, prompts, list(range(len(prompts)))), latent_shape(loaded, sampler.size_px)
    pipe = StableDiffusion3Pipeline.from_pretrained(source.path, torch_dtype=torch.float32, **parts)
    pipe.scheduler.set_shift(1.0)
    pipe.set_progress_bar_config(disable=True)
    worst = 99.0
    for seed, prompt in enumerate(prompts):
        theirs = pipe(
            prompt,
            latents=torch.from_numpy(latents(shape, [seed])),
            sigmas=sampler.sigmas[:-1],
            guidance_scale=sampler.guidance,
            max_sequence_length=sampler.tokens["t5"],
            height=sampler.size_px.height,
            width=sampler.size_px.width,
            output_type="np",
        ).images[0]
        worst = min(worst, psnr(ours[seed], np.round(theirs * 255)))
    return worst


def exported(device: Path, student: Path, prompts: list[str]) -> float:
    """Lowest PSNR between the exported artifact's pictures and torch's."""
    source = open_artifact(student)
    seeds = list(range(len(prompts)))
    ours = DevicePipeline(open_artifact(device)).sample(prompts, seeds)
    torchs = sample(load_pipeline(source.path), sampler_of(source), prompts, seeds)
    return min(psnr(a, b) for a, b in zip(ours, torchs, strict=True))


def transformer_bytes(path: Path) -> int:
    """Bytes of the transformer's weights and graph."""
    return sum(f.size for f in open_artifact(path).manifest.files if f.path.startswith("transformer/") and not f.path.endswith(".json"))


def main(demo: Path) -> None:
    """Measure, print and write the bars of the artifacts in `demo`."""
    rows = json.loads((demo / "bench" / "bench.json").read_text())["results"]
    score = {Path(r["artifact"]).name: r["quality"]["composition"]["overall"] for r in rows}
    prompts = worlds.get("shapes").prompts(5, 1)
    picture = [demo / "bench" / f"again{i}.png" for i in (1, 2)]
    draw = ("generate", str(demo / "device"), PROMPT, "--engine", "onnxruntime")
    for file in picture:
        subprocess.run([sys.executable, "-m", "flashgen", *draw, "--seed", "1", "-o", str(file)], check=True)
    wall = seconds(*draw, "-o", str(picture[0].with_name("timed.png")))
    device, slim = transformer_bytes(demo / "device"), transformer_bytes(demo / "slim")
    found = [
        ("student / teacher composition", score["student"] / max(score["shapes"], 1e-9), ">= 0.85"),
        ("INT4 device - fp student, composition", score["device"] - score["slim"], ">= -0.03"),
        ("INT4 device / student composition", score["device"] / max(score["student"], 1e-9), ">= 0.95"),
        ("transformer bytes, INT4 ONNX / fp16", device / slim, "<= 0.35"),
        ("exported fp32 against torch, PSNR dB", exported(demo / "device-fp32", demo / "slim", prompts), ">= 60"),
        ("student in diffusers against flashgen, PSNR dB", in_diffusers(demo / "student", prompts), ">= 60"),
        ("generate on the device artifact, whole process, s", wall, "<= 2"),
        ("flashgen --help, s", seconds("--help"), "<= 0.4"),
        ("same command twice, identical PNG bytes", float(picture[0].read_bytes() == picture[1].read_bytes()), ">= 1"),
    ]
    report([Bar(*row) for row in found], demo / "bench" / "bars.json", "make demo")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main(Path(sys.argv[1]))
