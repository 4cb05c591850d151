"""One artifact in a process of its own, so that its peak memory and its threads are its own. `flashgen.metrics.latency` starts it.

python -m flashgen.metrics.worker FOLDER

FOLDER/job.json is a `Job`. Every line on stdin holds the arguments of `Session.draw` as JSON, the last one null; every line on stdout
is an answer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import FlashgenError
from flashgen.pixels import read_size
from flashgen.runtime.memory import PhasePeaks
from flashgen.runtime.processes import end_with_parent
from flashgen.runtime.timing import Laps

IMAGES = "images.npy"
PHASES = {"transformer": "step", "vae_decoder": "decode", "step": "step", "decode": "decode", "load": "load"}  # all other laps: encode
Draw = Callable[[list[str], list[int], int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Job:
    """An artifact, drawn along `sigmas` by `engine`: torch for diffusers layouts, one of `device.providers` for exported artifacts."""

    artifact: str
    engine: str
    sigmas: tuple[float, ...]
    size: str = ""  # for torch; empty: as trained
    device: str = "auto"  # for torch
    threads: int | None = None  # None: as the engine chooses


class Session:
    """A loaded artifact that draws. Peaks of memory by phase are those of the first drawing, whose times nobody needs."""

    def __init__(self, job: Job) -> None:
        source = open_artifact(job.artifact)
        assert source.manifest.sampler is not None
        self.memory = PhasePeaks()
        self.laps = Laps(memory=self.memory)
        self.about: dict[str, Any] = {"engine": job.engine, "device": "cpu"}
        load = _load_torch if job.engine == "torch" else _load_exported
        self._draw, self._device_memory = load(source, source.manifest.sampler, job, self.laps, self.about)

    def draw(self, prompts: list[str], seeds: list[int], batch: int) -> NDArray[np.uint8]:
        """Pictures [N, H, W, 3]."""
        try:
            return self._draw(prompts, seeds, batch)
        finally:
            self.laps.memory = None

    def record(self) -> dict[str, Any]:
        """Record of a drawing; `laps` are the seconds of the laps since the last record."""
        laps = dict(self.laps.seconds)
        self.laps.seconds.clear()
        phases: dict[str, float | None] = dict.fromkeys(("load", "encode", "step", "decode"))
        for name, mib in self.memory.mib.items():
            phase = PHASES.get(name, "encode")
            phases[phase] = max(phases[phase] or 0.0, mib)
        measured = {"peak_rss_mib": self.memory.process_mib(), "peak_phase_mib": phases}
        return self.about | measured | self._device_memory() | {"laps": laps}


def _load_exported(
    source: Artifact, sampler: Sampler, job: Job, laps: Laps, about: dict[str, Any]
) -> tuple[Draw, Callable[[], dict[str, Any]]]:
    from importlib import import_module

    from flashgen.device.engine import default_threads
    from flashgen.device.sampler import DevicePipeline

    about["threads"] = default_threads()
    pipeline = DevicePipeline(source, laps=laps, engine=job.engine)
    import_module(pipeline.engine.name.partition(":")[0])  # importing is no part of "load"
    return lambda prompts, seeds, batch: pipeline.sample(prompts, seeds, batch=batch, sigmas=job.sigmas), dict


def _load_torch(
    source: Artifact, sampler: Sampler, job: Job, laps: Laps, about: dict[str, Any]
) -> tuple[Draw, Callable[[], dict[str, Any]]]:
    import torch

    from flashgen.models.pipeline import load_pipeline
    from flashgen.models.sample import sample
    from flashgen.runtime.accelerator import device_of, drawing_dtype, free_bytes

    device = device_of(job.device)
    about["threads"] = torch.get_num_threads()
    if device.type in ("cuda", "mps"):
        laps.wait = getattr(torch, device.type).synchronize
        about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with laps.lap("load"):
        pipe = load_pipeline(source.path, drawing_dtype(device), device=device)
    size = read_size(job.size) if job.size else None

    def memory() -> dict[str, Any]:
        if device.type != "cuda":
            return {}
        return {"peak_device_mib": round(torch.cuda.max_memory_allocated(device) / 2**20), "free_device_bytes": free_bytes(device)}

    def draw(prompts: list[str], seeds: list[int], batch: int) -> NDArray[np.uint8]:
        return sample(pipe, sampler, prompts, seeds, batch=batch, sigmas=job.sigmas, size_px=size, laps=laps)

    return draw, memory


def main(folder: Path) -> None:
    """Draw what stdin asks for until a line says null; with `save` in a request the pictures go to FOLDER/images.npy.

    When the process that measures dies, this one ends too and removes the folder of the measurement, FOLDER's parent.
    """

    def clean() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)

    end_with_parent(clean)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    try:
        session = Session(Job(**json.loads((folder / "job.json").read_text())))
        for line in sys.stdin:
            if (request := json.loads(line)) is None:
                return
            save = request.pop("save")
            images = session.draw(**request)
            if save:
                np.save(folder / IMAGES, images)
            answer(session.record())
        clean()
    except FlashgenError as error:
        answer({"error": type(error).__name__, "message": str(error)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
