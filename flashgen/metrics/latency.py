"""Rows of the bench: each is drawn by a process of its own (`flashgen.metrics.worker`); rounds over the rows are interleaved.

A row's process loads once and draws one picture, which is the cold start. Then every round draws a few pictures in every row, one row
after the other, so that a machine that becomes slower or faster does so for all rows. Rows whose processes do not fit into memory
together are measured in groups.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from flashgen import errors
from flashgen.errors import FlashgenError
from flashgen.metrics.machine import NoiseMeter
from flashgen.metrics.worker import IMAGES, PHASES, Job
from flashgen.progress import Progress, say
from flashgen.recipe.schema import BenchRecipe

ROOM = 3.0  # free bytes per byte of an artifact for one more process: fp32 of fp16 files, and activations
RESAMPLES = 1000
STOP_S = 10.0

Answer = dict[str, Any]
Pictures = NDArray[np.uint8]


class Row:
    """One row while it is measured. `error` says why a row has ended early; such a row answers nothing more."""

    def __init__(self, job: Job, size_bytes: int, folder: Path) -> None:
        self.job, self.size_bytes, self.folder = job, size_bytes, folder
        self.pictures_key = replace(job, threads=None)  # threads do not change pictures, so rows of one key share them
        self.error: FlashgenError | None = None
        self.cold_s = 0.0
        self.first: Answer = {}
        self.rounds: list[Answer] = []
        self._process: subprocess.Popen[str] | None = None

    def start(self, prompt: str, seed: int) -> None:
        """Start the process and draw the first picture."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.json").write_text(json.dumps(asdict(self.job)))
        search = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
        if self.job.threads:
            environment["OMP_NUM_THREADS"] = str(self.job.threads)
        command = [sys.executable, "-m", "flashgen.metrics.worker", str(self.folder)]
        began = time.perf_counter()
        with (self.folder / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8"
            )
        self.first = self._ask([prompt], [seed], 1) or {}
        self.cold_s = time.perf_counter() - began

    def round(self, prompts: list[str]) -> None:
        """Draw `prompts` one at a time; all but the last are for warming up."""
        if answer := self._ask(prompts, [0] * len(prompts), 1):
            self.rounds.append(answer)

    def draw(self, prompts: list[str], seeds: list[int], batch: int) -> Pictures | None:
        """The pictures that are judged, [N, H, W, 3], mapped from a file in the row's folder; None after a failure."""
        return np.load(self.folder / IMAGES, mmap_mode="r") if self._ask(prompts, seeds, batch, save=True) else None

    def close(self) -> None:
        """End the process, and repeat its warnings."""
        if self._process is None:
            return
        assert self._process.stdin and self._process.stdout
        try:
            print("null", file=self._process.stdin, flush=True)
            self._process.stdin.close()
            self._process.wait(STOP_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None
        for line in dict.fromkeys(self._stderr()):
            if line.startswith("warning: "):
                say(line)

    def totals_s(self) -> NDArray[np.float64]:
        """Seconds of the picture of each round."""
        encode, step, decode = self.seconds()
        return np.asarray(encode + step.sum(1) + decode)

    def seconds(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of encode [N], step [N, steps] and decode [N] of the picture of each round."""
        parts = [picture_seconds(answer["laps"], len(self.job.sigmas) - 1) for answer in self.rounds]
        encode, step, decode = (np.asarray(part, np.float64) for part in zip(*parts, strict=True))
        return encode, step, decode

    def is_settled(self, precision: float) -> bool:
        """Return True if half the interval of the median is at most `precision`, as a share of the median."""
        low, high = median_interval(self.totals_s())
        return bool(high - low <= 2 * precision * float(np.median(self.totals_s())))

    def _ask(self, prompts: list[str], seeds: list[int], batch: int, save: bool = False) -> Answer | None:
        process = self._process
        if self.error is not None or process is None:
            return None
        assert process.stdin and process.stdout
        try:
            print(json.dumps({"prompts": prompts, "seeds": seeds, "batch": batch, "save": save}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except OSError:
            line = ""
        answer: Answer = json.loads(line) if line else {"error": "MachineError", "message": self._why(process.wait())}
        if "error" in answer:
            self.error = getattr(errors, answer["error"])(answer["message"])
            return None
        return answer

    def _why(self, code: int) -> str:
        lines = self._stderr()
        why = (
            f"was killed by signal {-code}" if code < 0 else f"ended with code {code} ({lines[-1]})" if lines else f"ended with code {code}"
        )
        return f"measuring {self.job.artifact} {why}; out of memory? Try --set bench.batch=1"

    def _stderr(self) -> list[str]:
        return [line.strip() for line in (self.folder / "stderr").read_text(errors="replace").splitlines() if line.strip()]


def measure(rows: Sequence[Row], prompts: list[str], seeds: list[int], how: BenchRecipe, noise: NoiseMeter) -> dict[Job, Pictures]:
    """Measure `rows`, and draw `prompts` from `seeds`: pictures by `Row.pictures_key`. Failures stay in `Row.error`."""
    left, pictures = list(rows), dict[Job, Pictures]()
    with Progress("bench", len(rows) * (2 + how.repeats)) as progress:
        while left:
            group: list[Row] = []
            try:
                while left and (not group or _has_room(left[0], group)):
                    group.append(left.pop(0))
                    group[-1].start(prompts[0], seeds[0])
                    progress.advance()
                _rounds(group, prompts, how, noise, progress)
                for row in group:
                    if row.pictures_key not in pictures and (drawn := row.draw(prompts, seeds, how.batch)) is not None:
                        pictures[row.pictures_key] = drawn
                    progress.advance()
            finally:
                for row in group:
                    row.close()
    return pictures


def _has_room(row: Row, group: list[Row]) -> bool:
    """Whether one more process fits into memory beside those of `group`."""
    free = [psutil.virtual_memory().available, *(r.first["free_device_bytes"] for r in group if r.first.get("free_device_bytes"))]
    return bool(ROOM * row.size_bytes < free[0] and (row.job.engine != "torch" or ROOM * row.size_bytes < free[-1]))


def _rounds(group: list[Row], prompts: list[str], how: BenchRecipe, noise: NoiseMeter, progress: Progress) -> None:
    """`how.repeats` rounds, and more within `how.extra_s` while a median is not known to `how.precision`."""
    per_round, number, deadline = how.warmup + 1, 0, float("inf")
    with noise.watching([r._process.pid for r in group if r._process]):
        while alive := [row for row in group if row.error is None]:
            if number == how.repeats:
                deadline = time.perf_counter() + how.extra_s
            if number >= how.repeats and (time.perf_counter() >= deadline or all(row.is_settled(how.precision) for row in alive)):
                return
            chosen = [prompts[(number * per_round + i) % len(prompts)] for i in range(per_round)]
            for row in alive:
                row.round(chosen)
                if number < how.repeats:
                    progress.advance()
            noise.tick()
            number += 1


def picture_seconds(laps: dict[str, list[float]], steps: int) -> tuple[float, list[float], float]:
    """Seconds of encode, of each step and of decode of the last picture that `laps` have; pictures were drawn one at a time.

    A step counts both passes of guidance; encode is the prompt's alone, without the negative prompt.
    """
    decodes = laps.get("decode") or laps["vae_decoder"]
    count = len(decodes)
    step = (laps.get("step") or laps["transformer"])[(count - 1) * steps : count * steps]
    encode = sum(values[count - 1] for name, values in laps.items() if name not in PHASES and name != "vae_encoder")
    return encode, step, decodes[-1]


def summarise(row: Row) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(latency_s, latency_interval_s) of a measured row, in seconds per picture.

    cold: from the start of the process to its first picture. load: all networks, without imports; the median where every picture loads
    them again. All others are medians, and the 95th percentile of step.
    """
    encode, step, decode = row.seconds()
    total = row.totals_s()
    loads = [sum(answer["laps"]["load"]) for answer in (row.first, *row.rounds) if answer["laps"].get("load")]
    latency = {
        "cold": row.cold_s,
        "load": np.median(loads),
        "encode": np.median(encode),
        "step_p50": np.median(step),
        "step_p95": np.percentile(step, 95),
        "decode": np.median(decode),
        "total_p50": np.median(total),
    }
    values = {"encode": encode, "step_p50": step, "decode": decode, "total_p50": total}
    intervals = {name: median_interval(value) for name, value in values.items()}
    return {k: round(float(v), 5) for k, v in latency.items()}, {k: (round(a, 5), round(b, 5)) for k, (a, b) in intervals.items()}


def median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Bounds of the median of `values` [N] or [N, K] with 95 % confidence: bootstrap over the N pictures, of which each has K values."""
    picked = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[picked].reshape(RESAMPLES, -1), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)
