"""Wall-clock laps by name, collected by the samplers and read by the bench."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Laps:
    """`seconds[name]` lists the seconds of every lap called `name`, in order."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time the body as one lap; a lap that raises is not counted."""
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)
