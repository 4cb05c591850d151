"""Damages files of tiny artifacts in every way that disks, tools and strangers have, and sees what the commands that read them do.

python -m benchmarks.mutations FOLDER --page docs/mutations.json      # `make mutations`: 1,265 mutations; resumes after a target
python -m benchmarks.mutations FOLDER --short                         # a few dozen, for CI

Each mutation runs in a child that is forked from a process which has imported everything. It is

    detected      exit code 2 to 5 with one sentence          regenerated   the same result, from a cache that was made again
    harmless      exit code 0 and the same result             followed      another result of data that nothing vouches for: a recipe,
                                                                            a plain folder, a version whose manifest was sealed again
and not allowed to be
    HARMFUL       another result with exit code 0             TRACE         exit code 1, a traceback, or a signal
    HANG          ten times the time of the undamaged one     MEMORY        more than twice its memory
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutation_targets import Ended, Target, targets

LEAST_S, LEAST_MIB = 30.0, 128  # below which a time or an amount of memory says nothing
BAD = ("HARMFUL", "TRACE", "HANG", "MEMORY")
SHORT = 3  # mutations per target


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit code (minus the signal), what it said, a hash of its result, seconds and MiB."""

    code: int
    text: str
    result: str
    seconds: float
    mib: float


def run(target: Target, folder: Path, limit_s: float) -> Outcome:
    """Read `folder` as `target` does, in a child."""
    start, (out, into) = time.monotonic(), os.pipe()
    if not (child := os.fork()):
        os.close(out)
        code, text, result = 0, "", ""
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the child's until it ends
        os.dup2(sys.stderr.fileno(), 2)
        try:
            result = hashlib.sha256(target.read(folder)).hexdigest()
        except Ended as ended:
            code, text = ended.code, ended.text
        except BaseException as error:
            from flashgen.cli.run import explain

            code, text = explain(error)
            text = f"error: {text}"
        with suppress(OSError):  # the parent may be gone
            os.write(into, json.dumps([code, text[:2000], result]).encode())
        os._exit(0)
    os.close(into)
    is_late = not select.select([out], [], [], limit_s)[0]
    if is_late:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(out, "rb") as stream:
        answer = stream.read()
    _, status, usage = os.wait4(child, 0)
    seconds, mib = time.monotonic() - start, usage.ru_maxrss / 1024
    if not answer:
        return Outcome(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else 1, "hang" if is_late else "no answer", "", seconds, mib)
    code, text, result = json.loads(answer)
    return Outcome(code, text, result, seconds, mib)


def classify(outcome: Outcome, undamaged: Outcome, target: Target, was_made_again: bool) -> str:
    """The class of `outcome`, `undamaged` being that of the files as they were."""
    if outcome.text == "hang":
        return "HANG"
    if outcome.mib > max(2 * undamaged.mib, undamaged.mib + LEAST_MIB):
        return "MEMORY"
    if outcome.code in (2, 3, 4, 5):
        errors = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
        return "detected" if len(errors) == 1 and "Traceback" not in outcome.text else "TRACE"
    if outcome.code:
        return "TRACE"
    if outcome.result == undamaged.result:
        return "regenerated" if was_made_again else "harmless"
    return "HARMFUL" if target.is_vouched else "followed"


# ---- mutations


def flip(rng: random.Random, data: bytes) -> bytes:
    """`data` with one bit changed."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut(rng: random.Random, data: bytes) -> bytes:
    """A beginning of `data`."""
    return data[: rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """`data` with a part of it twice."""
    start, end = sorted(rng.choices(range(len(data) + 1), k=2))
    return data[:end] + data[start:]


def swap(rng: random.Random, data: bytes) -> bytes:
    """`data` with two parts exchanged."""
    a, b, c = sorted(rng.choices(range(len(data) + 1), k=3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def noise(rng: random.Random, data: bytes) -> bytes:
    """`data` with a part of random bytes or zeros."""
    start = rng.randrange(len(data))
    part = data[start : start + rng.choice([1, 64, 4096])]
    return data[:start] + (bytes(len(part)) if rng.random() < 0.5 else rng.randbytes(len(part))) + data[start + len(part) :]


VALUES: list[Any] = [None, True, -1, 0, 1e308, 10**9, 10**400, 0.5, "", "x", "../../etc/passwd", "\x1b[31m", "é" * 5000, [], {}, [[]] * 9]


def field(rng: random.Random, data: bytes) -> bytes:
    """JSON `data` with another value of one field, without it, or with the values of two fields exchanged."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            visit(inner)

    visit(document)
    holder, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, other_key = rng.choice(places)
            with suppress(KeyError, IndexError, ValueError):
                holder[key], other[other_key] = other[other_key], holder[key]
        case 2 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice([2, -1, 1000]) + 1
        case _:
            holder[key] = rng.choice(VALUES)
    return json.dumps(document, indent=rng.choice([None, 1])).encode()


BYTES = (flip, flip, cut, repeat, swap, noise)


def mutate(rng: random.Random, folder: Path, target: Target) -> str:
    """Damage one file below `folder`; returns what was done to which."""
    file = folder / rng.choice(target.files(folder))
    data = file.read_bytes()
    if rng.random() < 0.04:
        file.unlink()
        return f"{file.relative_to(folder)}: removed"
    kinds: list[Callable[[random.Random, bytes], bytes]] = [*BYTES]
    with suppress(ValueError, UnicodeDecodeError, IndexError):
        if isinstance(json.loads(data), dict | list):
            kinds += [field] * 4
    kind = rng.choice(kinds)
    with suppress(ValueError, IndexError, RecursionError):  # of an empty file, and of documents in which a swap made a circle
        file.write_bytes(kind(rng, data))
    return f"{file.relative_to(folder)}: {kind.__name__}"


def measure(target: Target, count: int, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """The row of one target: its classes, and every mutation that ended in a bad one."""
    pristine, work, rng = folder / target.name / "pristine", folder / target.name / "damaged", random.Random(target.name)
    shutil.rmtree(folder / target.name, ignore_errors=True)
    pristine.parent.mkdir(parents=True)
    target.make(pristine)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    shutil.copytree(pristine, work)
    undamaged = run(target, work, 300)
    assert undamaged.code == 0, undamaged
    classes, bad = Counter[str](), list[str]()
    for number in range(count):
        shutil.rmtree(work)
        shutil.copytree(pristine, work)
        what = mutate(rng, work, target)
        if target.seal:
            with suppress(Exception):  # a manifest that is broken cannot be sealed
                target.seal(work)
        before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
        outcome = run(target, work, max(LEAST_S, 10 * undamaged.seconds))
        after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
        name = classify(outcome, undamaged, target, before != after)
        classes[name] += 1
        if name in BAD:
            bad.append(f"{number} {what}: {name}, exit {outcome.code}, {outcome.mib:.0f} MiB: {outcome.text[-300:]}")
            log(f"{target.name} {bad[-1]}")
    log(f"{target.name}: {dict(classes)}")
    return {"target": target.name, "mutations": count, **classes, "bad": bad}


def main() -> int:
    """Run all targets; 1 if any mutation ended in a bad class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute()
    chosen = [t for t in targets() if options.only in t.name and (t.is_fast or not options.short)]
    rows = []
    for target in chosen:
        done = folder / f"{target.name}.json"
        if not done.exists():
            row = measure(target, SHORT if options.short else target.count, folder, lambda text: print(text, flush=True))
            done.write_text(json.dumps(row))
        rows.append(json.loads(done.read_text()))
    if options.page:
        machine = {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        total = Counter[str]()
        for row in rows:
            total.update({key: value for key, value in row.items() if isinstance(value, int)})
        document = {"machine": machine, "command": "make mutations", "rows": [*rows, {"target": "all", **total}]}
        options.page.write_text(json.dumps(document, indent=1) + "\n")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
