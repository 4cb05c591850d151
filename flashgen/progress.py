"""Progress on stderr: a bar on terminals, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from flashgen.processes import rank

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")
SHOWN_ROWS = 5


def say(message: str) -> None:
    """One line for the reader, on stderr."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    say(f"warning: {message}")


def track(
    items: Iterable[T], label: str, *, total: int, done: int = 0, every_s: float = 30.0, rows: Sequence[Mapping[str, float]] = ()
) -> Iterator[T]:
    """Yield `items`, showing progress and the time left; on a terminal also the last of `rows`, which the caller may add to."""
    if rank():
        yield from items
        return
    if sys.stderr.isatty():
        yield from _bar(items, label, total, done, rows)
        return
    first = last = time.monotonic()
    for others, item in enumerate(items):
        yield item
        now = time.monotonic()
        if not others:
            first = now  # the first item may have compiled something: the rate is that of the others
        if now - last > every_s:
            count = done + others + 1
            left = f", about {(total - count) * (now - first) / others / 60:.1f} min left" if others else ""
            say(f"{label}: {count}/{total}{left}")
            last = now


def _bar(items: Iterable[T], label: str, total: int, done: int, rows: Sequence[Mapping[str, float]]) -> Iterator[T]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns)
    task = progress.add_task(label, total=total, completed=done)

    def shown() -> Group:
        return Group(_table(rows[-SHOWN_ROWS:]), progress) if rows else Group(progress)

    with Live(console=Console(stderr=True), transient=True, get_renderable=shown, refresh_per_second=4):
        for item in items:
            yield item
            progress.advance(task)


def _table(rows: Sequence[Mapping[str, float]]) -> Table:
    """Metrics as columns, the latest row last; what does not fit the terminal is left out from the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in rows[-1]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if name in row else "" for name in rows[-1]))
    return table
