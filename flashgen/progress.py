"""Progress on stderr: a bar on terminals, a line now and then elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from flashgen.runtime.processes import rank

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

T = TypeVar("T")
SHOWN_ROWS = 5
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would obey, and broken Unicode written out as in `\\x1b`; line breaks stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(message: str) -> None:
    """Print one line on stderr, in the first process only."""
    if rank() == 0:
        print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one warning on stderr."""
    say(f"warning: {message}")


class Progress:
    """Progress of `total` units of work as a context manager; call `advance()` after each unit.

    On a terminal it is a bar with the time left and the last of `rows`, which the caller may add to; elsewhere a line every `every_s`
    seconds. Processes other than the first print nothing.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, every_s: float = 30.0, rows: Sequence[Mapping[str, float]] = ()) -> None:
        self.label, self.total, self.count, self.start = label, total, done, done
        self.every_s, self.rows = every_s, rows
        self._live: Any = None
        self._first = self._last = time.monotonic()

    def __enter__(self) -> Self:
        if rank() == 0 and sys.stderr.isatty():
            self._open_bar()
        self._first = self._last = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self) -> None:
        """One more unit is done."""
        self.count += 1
        if self._live is not None:
            self._bar.advance(self._task)
            return
        now, others = time.monotonic(), self.count - self.start - 1
        if others == 0:
            self._first = now  # the first unit may have compiled something: the rate is that of the others
        if now - self._last > self.every_s and rank() == 0:
            left = f", about {(self.total - self.count) * (now - self._first) / others / 60:.1f} min left" if others else ""
            say(f"{self.label}: {self.count}/{self.total}{left}")
            self._last = now

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.count)
        self._live = Live(console=Console(stderr=True), transient=True, get_renderable=self._shown, refresh_per_second=4)
        self._live.start()

    def _shown(self) -> Group:
        from rich.console import Group

        return Group(_table(self.rows[-SHOWN_ROWS:], self._live.console.width), self._bar) if self.rows else Group(self._bar)


def track(
    items: Iterable[T], label: str, *, total: int, done: int = 0, every_s: float = 30.0, rows: Sequence[Mapping[str, float]] = ()
) -> Iterator[T]:
    """Yield `items` and show progress (`Progress`)."""
    with Progress(label, total, done=done, every_s=every_s, rows=rows) as progress:
        for item in items:
            yield item
            progress.advance()


def _table(rows: Sequence[Mapping[str, float]], width: int) -> Table:
    """Metrics as columns, the latest row last; columns that do not fit a terminal of `width` characters are left out from the right."""
    from rich import box
    from rich.table import Table

    table, left = Table(box=box.SIMPLE), width - 1
    shown = []
    for name in rows[-1]:
        cells = [f"{row[name]:.4g}" if name in row else "" for row in rows]
        left -= 3 + max(len(name), *map(len, cells))  # a column has three characters of space
        if left < 0:
            break
        table.add_column(name, justify="right", no_wrap=True)
        shown.append(cells)
    for row_cells in zip(*shown, strict=True):
        table.add_row(*row_cells)
    return table
