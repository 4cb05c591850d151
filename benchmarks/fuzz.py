"""Fuzzes what reads text and files of others; counts and findings in docs/fuzz.json.

    python -m benchmarks.fuzz artifacts/fuzz --page docs/fuzz.json      # `make fuzz`; resumes

Command lines and recipes are hypothesis' (tests/fuzz/inputs.py), run in this process, with the long part of each command cut off; a bug is
exit code 1. The readers of manifests, safetensors headers and PNG texts are atheris' (`pip install atheris`): a bug is any exception but
the ones that become a sentence. Work is done in parts, each in a process of its own with its number as seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMANDS = 20_000
READS = 1_000_000
MEMORY = 12 << 30  # bytes of addresses
PARTS = {"commands": 1_000, "manifest": 100_000, "header": 100_000, "png": 100_000}  # inputs per process


def command_lines(folder: Path, part: int) -> dict[str, Any]:
    """Run one part of the command lines; returns the exit codes, and the distinct bugs."""
    import resource

    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from flashgen.artifact.store import open_artifact
    from tests.conftest import make_pipeline_artifact, tiny_sampler
    from tests.fuzz import inputs

    for kind, guidance in (("student", 1.0), ("teacher", 4.5)):
        if not (folder / kind / "latest").exists():
            make_pipeline_artifact(folder / kind, kind=kind, sampler=tiny_sampler(guidance=guidance, trained_steps=[4] * (guidance == 1)))
    work, codes, bugs = folder / "work", Counter[str](), dict[str, str]()
    work.mkdir(exist_ok=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # an input that fills the memory is a bug of one command, not of the machine
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    artifacts = [open_artifact(folder / kind) for kind in ("student", "teacher")]
    lines = inputs.command_lines(work, [artifact.path for artifact in artifacts], artifacts[0].manifest.model_dump(mode="json"))

    @hypothesis.seed(part)
    @settings(
        max_examples=PARTS["commands"], deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        line = data.draw(lines)
        try:
            codes[str(inputs.outcome(line)[0])] += 1
        except AssertionError as error:
            codes["bug"] += 1
            bugs.setdefault(str(error)[-300:], str(error))

    with inputs.stopped():
        one()
    return {"runs": codes.total(), "exit_codes": dict(codes), "bugs": [*bugs.values()]}


def read_one(kind: str, scratch: Path) -> Callable[[bytes], None]:
    """A function that gives bytes to the reader `kind`; errors for users are what it should raise."""
    from flashgen.artifact.manifest import parse
    from flashgen.errors import FlashgenError
    from flashgen.models.stream import header
    from flashgen.png import read_texts

    file = scratch / f"{kind}-{os.getpid()}"
    file.write_bytes(b"")
    handle = os.open(file, os.O_RDWR)

    def one(data: bytes) -> None:
        with suppress(FlashgenError):
            if kind == "manifest":
                parse(data, "manifest.json")
                return
            os.ftruncate(handle, 0)
            os.pwrite(handle, data, 0)
            (header if kind == "header" else read_texts)(file)

    return one


def read_many(kind: str, corpus: Path, part: int, seeds: Path) -> None:
    """Run one part of atheris' inputs for the reader `kind`; never returns."""
    import atheris

    with atheris.instrument_imports(include=["flashgen.artifact.manifest", "flashgen.models.stream", "flashgen.png"]):
        one = read_one(kind, Path("/dev/shm"))
    flags = [
        f"-runs={PARTS[kind]}",
        f"-seed={part + 1}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup(["fuzz", *flags, f"-artifact_prefix={corpus.parent}/crash-{kind}-", str(corpus), str(seeds)], one)
    atheris.Fuzz()


def do_part(kind: str, folder: Path, part: int) -> dict[str, Any]:
    """One part in a process of its own."""
    corpus = folder / kind
    corpus.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", str(folder), "--part", kind, str(part)], capture_output=True, text=True)
    if kind == "commands" and done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    runs = next((int(line.split()[-1]) for line in done.stderr.splitlines() if "number_of_executed_units" in line), 0)
    return {"runs": runs, "bugs": [] if done.returncode == 0 else [done.stderr[-1500:]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", choices=PARTS, help="the others later; without --page")
    parser.add_argument("--part", nargs=2, metavar=("KIND", "N"))
    args = parser.parse_args()
    if args.part:
        kind, part = args.part[0], int(args.part[1])
        if kind == "commands":
            print(json.dumps(command_lines(args.folder, part)))
        else:
            read_many(kind, args.folder / kind, part, Path("tests/fuzz/seeds", kind))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, size in PARTS.items():
        if args.only not in (None, kind):
            continue
        total, started = COMMANDS if kind == "commands" else READS, time.perf_counter()
        row: dict[str, Any] = {"what": kind, "runs": 0, "bugs": [], "exit_codes": {}}
        for part in range(-(-total // size)):
            kept = args.folder / f"{kind}-{part:03d}.json"
            if not kept.exists():
                kept.write_text(json.dumps(do_part(kind, args.folder, part)))
                print(kind, part, f"{time.perf_counter() - started:.0f} s", kept.read_text()[:300], file=sys.stderr, flush=True)
            one = json.loads(kept.read_text())
            row["runs"] += one["runs"]
            row["bugs"] += one["bugs"]
            row["exit_codes"] = dict(Counter(row["exit_codes"]) + Counter(one.get("exit_codes", {})))
        rows.append({key: value for key, value in row.items() if key != "exit_codes" or value})
        if args.page:
            machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
            args.page.write_text(json.dumps({"machine": machine, "command": "make fuzz", "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["bugs"] for row in rows))


if __name__ == "__main__":
    main()
