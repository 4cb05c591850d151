"""The machine that numbers were measured on, and whether other work disturbed the measurement."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import psutil

from flashgen.runtime.memory import cpu_count, total_bytes
from flashgen.runtime.processor import this_processor

PACKAGES = ("flashgen", "numpy", "onnxruntime", "openvino", "torch", "diffusers", "transformers")
KERNEL_BYTES, REPEATS = 4 << 20, 5  # the calibration kernel: a SHA-256 of so many bytes, a few ms each
PAUSE_S = 0.02  # engines' threads spin for a while after their work
SPREAD, STEAL, OTHERS = 0.10, 0.02, 0.10  # above these shares a machine is noisy


def fingerprint() -> dict[str, Any]:
    """Conditions of a measurement beside the artifact: processor, memory, system and versions of packages."""
    processor, versions = this_processor(), {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    memory = total_bytes()
    return {
        "cpu": processor.name,
        "cores": os.cpu_count(),
        "usable_cores": cpu_count(),  # after affinity and quotas
        "instruction_sets": [*processor.features],
        "memory_mib": None if memory is None else round(memory / 2**20),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


class NoiseMeter:
    """Tells a quiet machine from a noisy one by the time of a fixed calculation in one thread, and by what processors did for others."""

    def __init__(self) -> None:
        self._kernel_s: list[float] = []
        self._steal_s = self._others_s = self._elapsed_s = 0.0
        self._bytes = bytes(KERNEL_BYTES)

    def tick(self) -> None:
        """Time the kernel; call this between rounds, when no row computes."""
        time.sleep(PAUSE_S)
        for _ in range(REPEATS):
            start = time.perf_counter()
            hashlib.sha256(self._bytes).digest()  # products of matrices would measure how BLAS shares out threads
            self._kernel_s.append(time.perf_counter() - start)

    @contextmanager
    def watching(self, own: Sequence[int]) -> Iterator[None]:
        """Count what processors do in the body for other processes than this one and `own`, and for other virtual machines."""
        before, start = _cpu_seconds(own), time.perf_counter()
        yield
        after = _cpu_seconds(own)
        self._elapsed_s += time.perf_counter() - start
        self._others_s += max(0.0, after[0] - before[0])
        self._steal_s += after[1] - before[1]

    def report(self, unsettled: Sequence[str] = (), precision: float = 0.0) -> dict[str, Any]:
        """`noisy`, the reasons for it in words (`why`), and the numbers: kernel in ms, all others as shares.

        `unsettled` names the rows whose median latency is known less precisely than `precision`, a share of it.
        """
        kernel = np.asarray(self._kernel_s or [0.0])
        low, middle, high = np.percentile(kernel, (10, 50, 90))
        spread = float((high - low) / middle) if middle else 0.0
        processor_s = max(self._elapsed_s, 1e-9) * (os.cpu_count() or 1)
        others, steal = self._others_s / processor_s, self._steal_s / processor_s
        why = [f"the median latency of {', '.join(dict.fromkeys(unsettled))} is not known to {100 * precision:g} %"] if unsettled else []
        if spread > SPREAD:
            why.append(f"the time of one fixed calculation varies by {spread:.0%}")
        if others > OTHERS:
            why.append(f"other processes use {others:.0%} of the processors")
        if steal > STEAL:
            why.append(f"other virtual machines took {steal:.0%} of the processors' time")
        numbers = {"kernel_ms": 1000 * float(middle), "kernel_spread": spread, "others": others, "steal": steal}
        return {"noisy": bool(why), "why": why, **{name: round(value, 4) for name, value in numbers.items()}}


def _cpu_seconds(own: Sequence[int]) -> tuple[float, float]:
    """(seconds for processes other than this one and `own`, seconds stolen by other virtual machines), of all processors together."""
    times = psutil.cpu_times()
    busy, ours = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")), 0.0
    for pid in (os.getpid(), *own):
        with suppress(psutil.Error):
            spent = psutil.Process(pid).cpu_times()
            ours += spent.user + spent.system
    return busy - ours, getattr(times, "steal", 0.0)
