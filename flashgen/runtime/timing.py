"""Wall-clock laps by name, collected by the samplers and read by the bench."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from flashgen.runtime.memory import PhasePeaks


class Laps:
    """`seconds[name]` lists the seconds of every lap called `name`, in order.

    `wait`, if given, waits until a device has done its work; it is called before a lap begins and before it ends. `memory`, if set, takes
    the peak of every lap; reading the peak takes 0.1 ms, so set `memory` to None for laps whose time counts.
    """

    def __init__(self, wait: Callable[[], None] | None = None, memory: PhasePeaks | None = None) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.wait = wait or (lambda: None)
        self.memory = memory

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time the body as one lap; a lap that raises is not counted."""
        with self.memory.phase(name) if self.memory else nullcontext():
            self.wait()
            start = time.perf_counter()
            yield
            self.wait()
            self.seconds[name].append(time.perf_counter() - start)
