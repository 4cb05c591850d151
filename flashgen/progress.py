"""Progress on stderr: a bar on terminals, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def say(message: str) -> None:
    """One line for the reader, on stderr."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    say(f"warning: {message}")


def track(items: Iterable[T], label: str, *, total: int, done: int = 0, every_s: float = 30.0) -> Iterator[T]:
    """Yield `items`, showing progress and the time left."""
    if sys.stderr.isatty():
        yield from _bar(items, label, total, done)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > every_s:
            left = (total - done - count) * (now - start) / count
            say(f"{label}: {done + count}/{total}, about {left / 60:.1f} min left")
            last = now


def _bar(items: Iterable[T], label: str, total: int, done: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)
