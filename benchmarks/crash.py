"""Kills every stage at random moments and at every step of publishing, and compares what the same command makes afterwards.

python -m benchmarks.crash artifacts/crash --page docs/crash.json      # `make crash-test`; the same command resumes
python -m benchmarks.crash FOLDER --short                              # a few kills of each case, for CI: 45 CPU seconds

Children are forked from a process that has imported everything, so that a run takes as long as its work. Faults are put into the
child's `os` functions. After each fault all that is published must be whole, the same command must finish, and its files must be those
of a run that nobody interrupted.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.crash_cases import Case, cases, prepare

CALLS = (
    "fsync",
    "rename",
    "replace",
    "link",
    "symlink",
    "truncate",
    "posix_fallocate",
    "mkdir",
    "rmdir",
    "unlink",
)  # and opening for writing
KILLS = 50  # at random moments, per case
CHAIN = 5  # of them before a run may finish
LIMIT_S = 300
FORKED = "Invalid thread pool"  # torch's error in 2 % of children forked from a process with threads: the same command tries again
PAGE = os.sysconf("SC_PAGE_SIZE")
IMPORTED = {"diffusers", "flashgen", "matplotlib", "numpy", "onnx", "onnxruntime", "peft", "PIL", "torch", "transformers"}
SLOW = ("export", "bench")
SHORT = ("teacher random", "distill", "generate", "votes", "statistics")


@dataclass(frozen=True)
class Fault:
    """Faults of a child: `signal` after `after_s` seconds or before call number `at_call` of `CALLS` (counted from the first step of
    publishing if `publishing`), the names of which go to the file `record`; files may not grow beyond `file_bytes`; a disk is not checked
    before work; a clock goes backwards."""

    signal: int = signal.SIGKILL
    after_s: float | None = None
    at_call: int | None = None
    publishing: bool = True
    record: Path | None = None
    file_bytes: int | None = None
    is_full: bool = False
    backwards: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a child ended: `code`, or minus the signal; what it printed; its seconds."""

    code: int
    text: str
    seconds: float


def install(fault: Fault) -> None:
    """Put the faults of this process into `os` and `time`."""
    count, is_counting = 0, not fault.publishing
    recorded = os.open(fault.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.record else -1

    def step(name: str) -> None:
        nonlocal count
        count += is_counting
        if is_counting and fault.record:
            os.write(recorded, f"{name}\n".encode())
        if is_counting and count == fault.at_call:
            os.kill(os.getpid(), fault.signal)
            time.sleep(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step(function.__name__)
            return function(*arguments, **options)

        return call

    def opened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            stream = function(file, mode, *arguments, **options)
            if set(mode) & set("wa+x") and str(file) != os.devnull:
                step("open")  # the file is empty then
            return stream

        return call

    from flashgen.artifact import draft

    published = draft.Draft.publish

    def publish(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal is_counting
        is_counting = True
        return published(self, *arguments, **options)

    draft.Draft.publish = publish  # type: ignore[method-assign]  # in a child that ends
    if fault.at_call is not None or fault.record:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = io.open = opened(io.open)
    if fault.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
    if fault.is_full:
        from flashgen.stages import planning

        planning.check_disk = lambda *_: None  # type: ignore[attr-defined]  # as imported there
    if fault.backwards:
        now = time.time
        began = now()
        time.time = lambda: began - 86400 - 100 * (now() - began)


def start(run: Callable[[Path], None], out: Path, fault: Fault, log: Path) -> int:
    """Fork a child that calls `run(out)` and ends with the exit code of the command; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        install(fault)
        run(out)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        with suppress(OSError):  # the limit on the size of files is one on the log too
            traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 5 if isinstance(error, OSError) else 1
        code = getattr(error, "exit_code", code)  # as the command line
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(pid: int, fault: Fault, log: Path, started: float) -> Outcome:
    """Wait for a child, with the signal of `fault` when its time has come."""
    sent, limit = fault.after_s is None, started + LIMIT_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if ended:
            return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), now - started)
        if not sent and now - started >= (fault.after_s or 0):
            os.kill(pid, fault.signal)
            sent = True
        if now > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


class Matrix:
    """Trials of all cases, or of those called `names`, below `root`; what is done is listed in root/done.jsonl, and not done again."""

    def __init__(self, root: Path, names: Collection[str] = (), is_short: bool = False) -> None:
        self.root, self.log, self.is_short = root, root / "log", is_short
        self.cases = [case for case in cases(root) if not names or case.name in names]
        self.references: dict[str, dict[str, str]] = {}
        self.done: list[dict[str, Any]] = []
        self.page: Path | None = None
        root.mkdir(parents=True, exist_ok=True)
        os.environ |= {"TMPDIR": str(root / "tmp"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        remove(root / "tmp")  # a run of this program that was killed leaves folders there
        (root / "tmp").mkdir()
        if (root / "done.jsonl").exists():
            self.done = [json.loads(line) for line in (root / "done.jsonl").read_text().splitlines()]

    def run(self, case: Case, out: Path, fault: Fault | None = None) -> Outcome:
        """Run a case in a child."""
        started = time.monotonic()
        return wait(start(case.run, out, fault or Fault(), self.log), fault or Fault(), self.log, started)

    def warm(self, case: Case) -> None:
        """Make what a case needs, run it once, undisturbed, and import what this run has imported."""
        out, names = self.root / case.name / "out", self.root / case.name / "modules.json"

        def listed(target: Path) -> None:
            case.run(target)
            names.write_text(json.dumps([name for name in sys.modules if name.split(".")[0] in IMPORTED]))

        if not (self.root / "prompts.txt").exists():
            prepare(self.root)  # here: it imports most of what the cases need, and starts no thread
        if case.name == "export":
            self._trace_ahead()
        if not (out.parent / "reference.json").exists():
            out.parent.mkdir(exist_ok=True)
            remove(out)
            outcome = self.run(replace(case, run=listed), out)
            self._expect(outcome, case.name)
            if self.is_short:
                (out.parent / "seconds").write_text(str(outcome.seconds))  # with imports, but that is one run less
            (out.parent / "reference.json").write_text(json.dumps(case.result(out)))
        self.references[case.name] = json.loads((out.parent / "reference.json").read_text())
        for name in json.loads(names.read_text()) if names.exists() else ():
            if name not in sys.modules:
                with suppress(Exception):  # some modules can only be imported by others
                    importlib.import_module(name)

    def _trace_ahead(self) -> None:
        """Trace in this process what `export` traces, most of its time, so that its children only copy the graphs."""
        from benchmarks.tracing import trace_ahead, traced_once
        from flashgen.export import graph, write

        traced = traced_once(graph.trace)
        trace_ahead(traced, self.root / "quantize" / "out")
        write.trace = traced  # type: ignore[assignment, attr-defined]  # imported there by name

    def seconds(self, case: Case) -> float:
        """Seconds of a run of a case, with all modules imported. Raises AssertionError if two runs give different files."""
        file = self.root / case.name / "seconds"
        if not file.exists():
            outcome = self.run(case, self.fresh(case))
            self._expect(outcome, case.name)
            assert case.result(self.out(case)) == self.references[case.name], f"{case.name}: two runs give different files"
            file.write_text(str(outcome.seconds))
        return float(file.read_text())

    def out(self, case: Case) -> Path:
        """Where trials of a case write."""
        return self.root / case.name / "trial" / "out"

    def fresh(self, case: Case) -> Path:
        """An `out` that does not exist."""
        remove(self.out(case).parent)
        self.out(case).parent.mkdir()
        return self.out(case)

    @contextmanager
    def trial(self, case: Case, kind: str, number: int) -> Iterator[Counter[str]]:
        """Record a trial: counts, and what went wrong."""
        counts, started = Counter[str](), time.monotonic()
        failure = None
        try:
            yield counts
        except Exception as error:
            failure = f"{type(error).__name__}: {error}; {self.log.read_text(errors='replace')[-1500:]}"
            print(f"FAILED {case.name}, {kind} {number}: {failure}", flush=True)
            if FORKED in failure:
                return
        row = {"case": case.name, "kind": kind, "number": number, "counts": dict(counts), "failure": failure}
        self.done.append(row)
        with (self.root / "done.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{case.name}, {kind} {number}: {dict(counts)} in {time.monotonic() - started:.1f} s", flush=True)

    def is_done(self, case: Case, kind: str, number: int) -> bool:
        """Whether an earlier run of this program has done a trial."""
        return any((row["case"], row["kind"], row["number"]) == (case.name, kind, number) for row in self.done)

    def finish(self, case: Case, out: Path) -> None:
        """The same command finishes, and its files are those of the run that nobody interrupted."""
        self._expect(self.run(case, out), case.name)
        case.check(out)
        digests, expected = case.result(out), self.references[case.name]
        wrong = sorted(name for name in digests.keys() | expected.keys() if digests.get(name) != expected.get(name))
        assert not wrong, f"files differ from those of an uninterrupted run: {wrong[:5]}"
        left = [str(path) for path in out.rglob("*.tmp")] if out.is_dir() else []
        assert not left, f"temporary files are left: {left[:5]}"
        until = time.monotonic() + 5
        while (tmp := list((self.root / "tmp").glob("flashgen-*"))) and time.monotonic() < until:
            time.sleep(0.1)
        assert not tmp, f"folders are left in TMPDIR: {tmp}"

    def interrupted(self, case: Case, number: int, how: signal.Signals) -> None:
        """Signals at random moments of runs that resume each other; two in the short form."""
        kind, draw = {signal.SIGKILL: "kill"}.get(how, how.name), random.Random(f"{case.name} {how} {number}")
        if self.is_done(case, kind, number):
            return
        with self.trial(case, kind, number) as counts:
            limit_s, out = self.seconds(case), self.fresh(case)
            for _ in range(2 if self.is_short else CHAIN):
                outcome = self.run(case, out, Fault(how, after_s=draw.uniform(0, limit_s)))
                case.check(out)
                if outcome.code == 0 and not counts["interrupted"]:  # as fast as that
                    out, limit_s = self.fresh(case), min(limit_s / 2, outcome.seconds)
                elif outcome.code == 0:
                    break
                else:
                    assert outcome.code in (-how, 128 + how), f"ended with {outcome.code}"
                    counts["interrupted"] += 1
            assert counts["interrupted"], "no run was interrupted"
            self.finish(case, out)

    def publishing(self, case: Case) -> None:
        """Kills before steps of publishing, each from a copy of what a kill before the first step leaves.

        Of equal steps that follow each other, such as the fsync of every file, the first and the last.
        """
        saved, steps = self.root / case.name / "saved", self.root / case.name / "steps"
        publishes = any((self.root / case.name / "out").glob("v0001"))  # else all steps count
        if not steps.exists():
            outcome = self.run(case, self.fresh(case), Fault(at_call=1, publishing=publishes))
            assert outcome.code == -signal.SIGKILL, f"{case.name} ended with {outcome.code} before publishing: {outcome.text[-2000:]}"
            remove(saved)
            copy(self.out(case), saved)
            self._expect(self.run(case, self.out(case), Fault(publishing=publishes, record=steps)), case.name)
        names = steps.read_text().split()
        edges = [n for n in range(len(names)) if names[n] not in names[max(n - 1, 0) : n] or names[n] not in names[n + 1 : n + 2]]
        for number in edges:
            if self.is_done(case, "publish", number):
                continue
            with self.trial(case, "publish", number) as counts:
                out = self.fresh(case)
                copy(saved, out)
                outcome = self.run(case, out, Fault(at_call=number + 1, publishing=publishes))
                assert outcome.code == -signal.SIGKILL, f"ended with {outcome.code}"
                counts["interrupted"] += 1
                case.check(out)
                self.finish(case, out)

    def full(self, case: Case, number: int, limit: bool = False) -> None:
        """A disk (or, with `limit`, the largest size of a file) that is too small, then one with room."""
        kind, draw = "file limit" if limit else "full disk", random.Random(f"{case.name} full {number}")
        if self.is_done(case, kind, number):
            return
        with self.trial(case, kind, number) as counts, mounted(self.root / "disk", limit) as disk:
            share, need = draw.random(), disk_bytes(self.root / case.name / "out")
            largest = max((path.stat().st_size for path in (self.root / case.name / "out").rglob("*") if path.is_file()), default=4096)
            out = disk / "out"
            fault = Fault(is_full=True, file_bytes=max(1, int(share * largest)) if limit else None)
            if not limit:
                (disk / "ballast").write_bytes(bytes(PAGE))  # a disk of memory has one page at least
                remount(disk, f"size={PAGE + int(share * 1.5 * need) // PAGE * PAGE}")
            outcome = self.run(case, out, fault)
            if outcome.code:
                counts["full"] += 1
                assert outcome.code == 5, f"ended with {outcome.code}"
                errors = [line for line in outcome.text.splitlines() if line.startswith("error: ")]  # none from what is no command
                assert all(str(self.root) in line for line in errors), f"the message names no path: {errors}"
            case.check(out)
            left = [path for path in out.rglob("*.tmp")] if out.is_dir() else []
            assert not left, f"temporary files are left: {left}"
            if not limit:
                remount(disk, "size=4g")
            self.finish(case, out)

    def read_only(self, case: Case) -> None:
        """A target that cannot be written to."""
        if self.is_done(case, "read-only", 0):
            return
        with self.trial(case, "read-only", 0) as counts, mounted(self.root / "disk") as disk:
            remount(disk, "ro")
            outcome = self.run(case, disk / "out")
            assert outcome.code in (2, 5) and str(disk) in outcome.text, f"ended with {outcome.code}"
            counts["refused"] += 1
            remount(disk, "rw")
            self.finish(case, disk / "out")

    def two(self, case: Case, number: int) -> None:
        """Two runs of one command at once."""
        if self.is_done(case, "two at once", number):
            return
        with self.trial(case, "two at once", number) as counts:
            out, started = self.fresh(case), time.monotonic()
            logs = [self.root / f"log-{n}" for n in (1, 2)]
            pids = [start(case.run, out, Fault(), log) for log in logs]
            ends = [wait(pid, Fault(), log, started) for pid, log in zip(pids, logs, strict=True)]
            codes = sorted(end.code for end in ends)
            assert codes in ([0, 0], [0, 5]), f"ended with {codes}: {[end.text[-500:] for end in ends]}"
            counts["at once" if codes[1] == 0 else "refused"] += 1
            self.finish(case, out)

    def clock(self, case: Case, number: int) -> None:
        """A clock that runs backwards during a run that is killed, and files from tomorrow when it is resumed."""
        if self.is_done(case, "clock", number):
            return
        draw = random.Random(f"{case.name} clock {number}")
        with self.trial(case, "clock", number) as counts:
            seconds, out = self.seconds(case), self.fresh(case)
            outcome = self.run(case, out, Fault(after_s=draw.uniform(0.3, 1) * seconds, backwards=True))
            counts["interrupted" if outcome.code else "finished"] += 1  # under a clock that runs backwards
            case.check(out)
            for path in out.rglob("*"):
                os.utime(path, (time.time() + 86400,) * 2, follow_symlinks=False)
            self.finish(case, out)

    def _expect(self, outcome: Outcome, what: str) -> None:
        assert outcome.code == 0, f"{what} ended with {outcome.code}: {outcome.text[-3000:]}"


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder with its links and times; nothing if there is no source."""
    if source.exists():
        subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def disk_bytes(path: Path) -> int:
    """Bytes of the files below a path."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


@contextmanager
def mounted(folder: Path, plain: bool = False) -> Iterator[Path]:
    """A small disk of its own at `folder`, in memory; with `plain` just a folder. Mounting needs root."""
    if folder.is_mount():  # of a run that was killed
        subprocess.run(["umount", "-l", str(folder)], check=True)
    remove(folder)
    folder.mkdir()
    if plain:
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a disk of `mounted`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def short(matrix: Matrix) -> None:
    """A few kills of each case, one full disk, and every kind of step of publishing once."""
    for case in matrix.cases:
        matrix.warm(case)
        matrix.interrupted(case, 0, signal.SIGKILL)
        if case.name != "distill":  # tests of checkpoints fill the disk
            matrix.full(case, 0, limit=True)
    matrix.publishing(next(case for case in matrix.cases if case.name == "teacher random"))


def everything(matrix: Matrix) -> None:
    """All trials in rounds over the cases, so that a run that is stopped early has something of each; slow cases have fewer rounds."""
    for number in range(KILLS):
        for case in matrix.cases:
            if case.name in SLOW and number % 3:
                continue
            if case.name not in matrix.references:
                matrix.warm(case)
            kills = sum(row["counts"].get("interrupted", 0) for row in matrix.done if (row["case"], row["kind"]) == (case.name, "kill"))
            if kills < KILLS:
                matrix.interrupted(case, number, signal.SIGKILL)
            if number == 0 and os.geteuid() == 0:  # who may mount
                matrix.read_only(case)
            if number < 3 and os.geteuid() == 0:
                matrix.full(case, number)
            if number == 1 or (case.name in SLOW and number == 3):
                matrix.publishing(case)
            if number < 2:
                matrix.interrupted(case, number, signal.SIGINT)
                matrix.interrupted(case, number, signal.SIGTERM)
                matrix.full(case, number, limit=True)
                matrix.two(case, number)
                matrix.clock(case, number)
        if matrix.page:
            write_page(matrix, matrix.page)


def write_page(matrix: Matrix, file: Path) -> None:
    """Write the counts by case and kind."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in matrix.done:
        if trial["number"] < 0:
            continue
        key = (trial["case"], trial["kind"])
        row = rows.setdefault(key, {"case": key[0], "kind": key[1], "trials": 0, "faults": 0, "failures": []})
        row["trials"] += 1
        row["faults"] += sum(trial["counts"].values())
        row["failures"] += [trial["failure"]] if trial["failure"] else []
    machine = {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    command = "python -m benchmarks.crash artifacts/crash --page docs/crash.json"
    file.write_text(json.dumps({"machine": machine, "command": command, "rows": list(rows.values())}, indent=1) + "\n")


def main() -> None:
    """Run the matrix; exit 1 if a trial has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--cases", nargs="*", help="names of cases, instead of all")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    matrix = Matrix(options.root.absolute(), SHORT if options.short else options.cases or (), options.short)
    matrix.page = options.page
    import torch

    torch.set_num_threads(1)
    try:
        (short if options.short else everything)(matrix)
    finally:
        if options.page:
            write_page(matrix, options.page)
    sys.exit(any(row["failure"] for row in matrix.done))


if __name__ == "__main__":
    main()
