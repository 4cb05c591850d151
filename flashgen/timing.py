"""Wall-clock laps by name, collected by the samplers and read by the bench; and the memory of this process."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Laps:
    """`seconds[name]` lists every lap of that name, in order."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)


def peak_rss_mib() -> float | None:
    """Peak resident memory of this process; None where the system does not tell (Windows). Not ru_maxrss on Linux: that one inherits
    the parent's peak through exec."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024, 1)
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)
