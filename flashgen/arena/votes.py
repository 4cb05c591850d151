"""votes.jsonl: raters and votes, one line each, written through to the disk before anyone hears that they are recorded.

A line is {"crc": CRC-32 of the row's text in hex, "row": {...}}. Rows have a `kind`: `rater` (a rater and the place in the plan), `slot`
(a place that was given to an exported page), and `pair`, `repeat` or `gold` (a vote). The last vote on a comparison counts: earlier ones
were taken back.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from flashgen.arena.study import Comparison, Study, drawn_rows
from flashgen.artifact.files import fsync, locked
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.progress import warn

CHOICES = ("left", "right", "tie")
JUDGE = "judge:"  # prefix of the names of raters that are no people
MAX_NAME = 60
Row = dict[str, Any]


class NameTakenError(UsageError):
    """Another rater has the name already."""


@dataclass(frozen=True)
class Rater:
    """A rater of a study; `slot` is the rater's place in the plan."""

    name: str
    slot: int
    token_sha256: str


def line_of(row: Mapping[str, Any]) -> str:
    """The line of votes.jsonl for a row, with its end of line."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    return f'{{"crc":"{zlib.crc32(text.encode()):08x}","row":{text}}}\n'


def read(path: Path) -> list[Row]:
    """Rows of a file of votes. A line that is damaged, or cut because its writer was killed, is left out with a warning that names it."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        if (row := _row(line.strip())) is None:
            warn(f"{path}: line {number} is incomplete or damaged and is left out; the other lines are not affected")
        else:
            rows.append(row)
    return rows


def _row(line: bytes) -> Row | None:
    """Row of a line, None if the line is not what `line_of` wrote."""
    text = line[24:-1]
    if line != b'{"crc":"%08x","row":%s}' % (zlib.crc32(text), text):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def clean_name(name: str) -> str:
    """`name` with single spaces. Raises UsageError for an empty or long one, and for control characters."""
    clean = " ".join(unicodedata.normalize("NFC", name).split())
    if not 0 < len(clean) <= MAX_NAME or any(unicodedata.category(c)[0] == "C" for c in clean):
        raise UsageError(f"a rater's name has 1 to {MAX_NAME} letters; choose another name")
    return clean


class Votes:
    """The votes of a study, open for writing; `opened` makes one."""

    def __init__(self, study: Study) -> None:
        self.study, self.path = study, study.folder / "votes.jsonl"
        self._mutex = threading.Lock()
        self._raters: dict[str, Rater] = {}
        self._votes: dict[tuple[str, str], Row] = {}
        self._slots = 0
        is_new = not self.path.exists()
        self._file = self.path.open("ab", buffering=0)
        if is_new:
            fsync(study.folder)
        for row in read(self.path):
            self._index(row)
        if self.path.stat().st_size and self.path.read_bytes()[-1:] != b"\n":
            self._file.write(b"\n")  # ends a line that was cut, so that the next vote has a line of its own

    def join(self, name: str, token: str, slot: int | None = None) -> Rater:
        """The rater called `name` whose secret is `token`, registered if new; `slot` is the next free one unless given.

        Raises NameTakenError if the name is another rater's, UsageError for a name that nobody may have.
        """
        name = clean_name(name)
        if name.casefold().startswith(JUDGE):
            raise UsageError(f"names that begin with {JUDGE} are for programs; choose another name")
        digest = sha256(token.encode()).hexdigest()
        with self._mutex:
            known = self._raters.get(name.casefold())
            if known is not None:
                if known.token_sha256 != digest:
                    raise NameTakenError(f"another rater is called {name}; choose another name, or go on in the browser in which you began")
                return known
            self._append({"kind": "rater", "rater": name, "slot": self._slots if slot is None else slot, "token_sha256": digest})
            return self._raters[name.casefold()]

    def rater(self, name: str) -> Rater | None:
        """The rater called `name`, if there is one."""
        with self._mutex:
            return self._raters.get(clean_name(name).casefold())

    def take_slot(self) -> int:
        """Reserve the next free place in the plan for a page that is exported."""
        with self._mutex:
            self._append({"kind": "slot", "slot": self._slots})
            return self._slots - 1

    @property
    def slots(self) -> int:
        """Number of places in the plan that are taken."""
        return self._slots

    def vote(self, rater: str, comparison: Comparison, choice: str, seconds: float | None, time: str | None = None) -> bool:
        """Record a vote durably; return False if the same vote is there already (a retry), which writes nothing.

        Raises UsageError for an unknown choice. On OSError (disk full) nothing is recorded.
        """
        if choice not in CHOICES or (choice == "tie" and not self.study.settings.ties):
            raise UsageError(f"a vote is {', '.join(CHOICES if self.study.settings.ties else CHOICES[:2])}, not {choice[:20]}")
        names = [None if side is None else self.study.artifacts[side] for side in (comparison.left, comparison.right)]
        with self._mutex:
            old = self._votes.get((rater, comparison.id))
            if old is not None and old["choice"] == choice:
                return False
            when = time or datetime.now(UTC).isoformat(timespec="seconds")
            row = {"kind": comparison.kind, "rater": rater, "comparison": comparison.id, "item": comparison.item}
            duration = None if seconds is None or not 0 <= seconds < math.inf else seconds
            self._append({**row, "left": names[0], "right": names[1], "choice": choice, "seconds": duration, "time": when})
            return True

    def of(self, rater: str) -> dict[str, str]:
        """Choice by comparison of one rater."""
        with self._mutex:
            return {comparison: str(row["choice"]) for (name, comparison), row in self._votes.items() if name == rater}

    def rows(self) -> list[Row]:
        """The votes that count, one row each."""
        with self._mutex:
            return list(self._votes.values())

    def raters(self) -> list[Rater]:
        """The people who joined."""
        with self._mutex:
            return list(self._raters.values())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, row: Row) -> None:
        end = os.fstat(self._file.fileno()).st_size
        content = line_of(row).encode()
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise
        self._index(row)

    def _index(self, row: Row) -> None:
        if row["kind"] in ("rater", "slot"):
            self._slots = max(self._slots, int(row["slot"]) + 1)
        if row["kind"] == "rater":
            self._raters[row["rater"].casefold()] = Rater(row["rater"], row["slot"], row["token_sha256"])
        elif row["kind"] != "slot":
            self._votes[row["rater"], row["comparison"]] = row


@contextmanager
def opened(study: Study) -> Iterator[Votes]:
    """The votes of `study`, which no other process can write to meanwhile. Raises MachineError if one does already."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(study.folder))
        except MachineError as error:
            raise MachineError(f"another process serves or collects the votes of {study.folder}; end that process first") from error
        votes = Votes(study)
        stack.callback(votes.close)
        yield votes


def counted(study: Study) -> list[Row]:
    """The votes that count, read without writing. Raises ArtifactError if there are none."""
    latest: dict[tuple[str, str], Row] = {}
    path = study.folder / "votes.jsonl"
    for row in read(path) if path.exists() else []:
        if row["kind"] in ("pair", "repeat", "gold"):
            latest[row["rater"], row["comparison"]] = row
    if not latest:
        raise ArtifactError(f"{study.folder} has no votes yet; collect some first")
    return list(latest.values())


def judge_votes(study: Study, name: str, scores: Mapping[str, list[float]], higher_is_better: bool = True) -> int:
    """Let a program vote on every pair and item by its scores: artifact -> one number per item. Returns the number of new votes.

    The rater is called judge:`name`; `flashgen.arena.analysis` never counts it with people.
    """
    if wrong := [artifact for artifact in study.artifacts if len(scores.get(artifact, [])) != len(study.prompts)]:
        raise UsageError(f"judge {name} has no score per picture of {', '.join(wrong)}; give {len(study.prompts)} numbers each")
    new = 0
    with opened(study) as votes:
        for item in range(len(study.prompts)):
            for a, b in study.pairs:
                left, right = (scores[study.artifacts[side]][item] for side in (a, b))
                better = "tie" if left == right else "left" if (left > right) == higher_is_better else "right"
                if better != "tie" or study.settings.ties:
                    new += votes.vote(JUDGE + clean_name(name), Comparison(f"{item}/{a}/{b}", "pair", item, a, b), better, None)
    return new


def bench_votes(study: Study, bench_out: Path) -> int:
    """Let the judges of the bench from whose folder `study` was built vote, each that has a number per picture; the number of new votes."""
    rows, new = drawn_rows(json.loads((bench_out / "bench.json").read_text())), 0
    for metric in sorted(set.intersection(*(set(row.get("values", {})) for row in rows))):
        scores = {name: row["values"][metric] for name, row in zip(study.artifacts, rows, strict=True)}
        new += judge_votes(study, metric, scores, rows[0]["quality_of"][metric]["higher_is_better"])
    return new
