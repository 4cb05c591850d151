"""Latency, memory and pictures of one artifact, measured in a process of its own so that the peak memory is its own.

python -m flashgen.metrics.latency JOB.json      reads a `Job`, writes result.json and images.npy beside it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen import errors
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import FlashgenError, MachineError
from flashgen.runtime.memory import peak_rss_mib
from flashgen.runtime.timing import Laps

NOT_ENCODING = {"load", "step", "decode", "transformer", "vae_decoder", "vae_encoder"}  # all other laps are text encoders


@dataclass(frozen=True)
class Job:
    """`prompts` are drawn in batches for their quality; warmup + repeats single pictures before that for the latency."""

    artifact: str
    prompts: list[str]
    seeds: list[int]
    warmup: int
    repeats: int
    batch: int
    engine: str = "onnxruntime"  # of exported artifacts
    device: str = "auto"  # of all others, which torch draws


def measure_apart(job: Job, folder: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Run `job` in a fresh process: (engine, steps, latency_s, peak_rss_mib) and the pictures. Errors are raised as they were there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    search = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-m", "flashgen.metrics.latency", str(folder / "job.json")]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if not (folder / "result.json").exists():
        raise MachineError(f"measuring {job.artifact} ended with code {done.returncode}; out of memory? Try --set bench.batch=1")
    result = json.loads((folder / "result.json").read_text())
    if "error" in result:
        raise getattr(errors, result["error"])(result["message"])
    return result, np.load(folder / "images.npy")


def measure(job: Job) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Measure in this process: (engine, steps, latency_s, peak_rss_mib) and the pictures."""
    source = open_artifact(job.artifact)
    laps = Laps()
    draw = _device(source, laps, job.engine) if source.manifest.kind == "device" else _torch(source, laps, job.device)
    singles = [job.prompts[i % len(job.prompts)] for i in range(job.warmup + job.repeats)]
    draw(singles, [0] * len(singles), 1)
    assert source.manifest.sampler is not None
    steps = len(source.manifest.sampler.sigmas) - 1
    result = {
        "engine": job.engine if source.manifest.kind == "device" else "torch",
        "steps": steps,
        "latency_s": summarise(laps, steps, job.warmup, job.repeats),
        "peak_rss_mib": peak_rss_mib(),
    }
    if source.manifest.kind != "device" and (peak := _peak_device_mib(job.device)) is not None:
        result["peak_device_mib"] = peak
    return result, draw(job.prompts, job.seeds, job.batch)


def _device(source: Artifact, laps: Laps, engine: str) -> Any:
    from importlib import import_module

    from flashgen.device.sampler import DevicePipeline

    pipeline = DevicePipeline(source, laps=laps, engine=engine)
    import_module(engine)  # importing is no part of "load"
    return lambda prompts, seeds, batch: pipeline.sample(prompts, seeds, batch=batch)


def _torch(source: Artifact, laps: Laps, device_name: str) -> Any:
    import torch

    from flashgen.models.pipeline import load_pipeline
    from flashgen.models.sample import sample
    from flashgen.runtime.accelerator import device_of, drawing_dtype

    device = device_of(device_name)
    if device.type in ("cuda", "mps"):
        laps.wait = getattr(torch, device.type).synchronize
    with laps.lap("load"):
        pipe = load_pipeline(source.path, drawing_dtype(device), device=device)
    return lambda prompts, seeds, batch: sample(pipe, source.manifest.sampler, prompts, seeds, batch=batch, laps=laps)  # type: ignore[arg-type]


def _peak_device_mib(device_name: str) -> int | None:
    """Peak memory of tensors on a GPU; None on other devices, whose memory nothing counts."""
    import torch

    from flashgen.runtime.accelerator import device_of

    device = device_of(device_name)
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def summarise(laps: Laps, steps: int, warmup: int, repeats: int) -> dict[str, float]:
    """Seconds per picture after `warmup` ones: medians of encode, step and decode, 95th percentile of step, median of their sum.

    load is the sum over all networks, without imports. A step counts both passes of guidance; encode is the prompt's alone.
    """
    seconds = laps.seconds
    count = warmup + repeats
    encode = np.sum([values[:count] for name, values in seconds.items() if name not in NOT_ENCODING], 0)[warmup:]
    step = np.reshape((seconds["step"] or seconds["transformer"])[: count * steps], (count, steps))[warmup:]
    decode = np.asarray((seconds["decode"] or seconds["vae_decoder"])[:count])[warmup:]
    found = {
        "load": np.sum(seconds["load"]),
        "encode": np.median(encode),
        "step_p50": np.median(step),
        "step_p95": np.percentile(step, 95),
        "decode": np.median(decode),
        "total_p50": np.median(encode + step.sum(1) + decode),
    }
    return {k: round(float(v), 5) for k, v in found.items()}


def main(job_file: Path) -> None:
    """Measure the job in `job_file`; result.json and images.npy go beside it."""
    try:
        result, images = measure(Job(**json.loads(job_file.read_text())))
        np.save(job_file.with_name("images.npy"), images)
    except FlashgenError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    job_file.with_name("result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
