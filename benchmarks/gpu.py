"""Speed, memory and agreement of a GPU, with random weights in SD3.5-Medium's shapes: ten minutes, no download.

python -m benchmarks.gpu [--page docs/gpu.md] [--peak-tflops N] [--tiny]

Rows are written as soon as they are measured, and a run on the same machine with the same code keeps the parts that are finished.
`--tiny` runs every part on the CPU in small: it tests this script, and its numbers mean nothing. Exit codes: 0, 1 when a part failed, 5
without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_page import page
from benchmarks.gpu_setup import SD35_MEDIUM, TINY, Bench
from flashgen.errors import MachineError
from flashgen.metrics.machine import fingerprint as machine
from flashgen.runtime.accelerator import device_of
from flashgen.runtime.machines import bf16_peak

ROOT = Path(__file__).parents[1]
PAGE, TINY_PAGE = ROOT / "docs" / "gpu.md", ROOT / "artifacts" / "gpu-tiny" / "gpu.md"
# Each part and the seconds after which it is stopped: nine minutes together, and one to start.
PARTS: dict[str, tuple[Callable[[Bench], Iterator[dict[str, Any]]], float]] = {
    "compare": (gpu_parts.compare, 45),
    "passes": (gpu_parts.passes, 135),
    "lora": (gpu_parts.lora, 120),
    "full": (gpu_parts.full, 120),
    "drawing": (gpu_parts.drawing, 120),
}


def about(device: torch.device, given: float | None) -> dict[str, Any]:
    """The machine and the code that are measured."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{machine()['cpu']} ({device.type})"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    return {
        "device": name,
        "device_bytes": total,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if on_gpu else "",
        "host": f"{machine()['cpu']}, {platform.platform()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "peak_flop_per_s": given * 1e12 if given else bf16_peak(name),
        "code": _code(),
    }


def _code() -> str:
    """Digest of everything that decides what is measured."""
    files = sorted([*ROOT.glob("flashgen/**/*.py"), *ROOT.glob("benchmarks/gpu*.py"), *ROOT.glob("recipes/*.yaml")])
    return hashlib.sha256(b"".join(str(f.relative_to(ROOT)).encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


def _commit() -> str:
    """The git commit, and whether files differ from it."""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return (_output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when `seconds` have passed; 0: never."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after its {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(bench: Bench, path: Path, facts: dict[str, Any], *, in_time: bool = True) -> bool:
    """Run the parts that `path`, a page, has not from this machine and code; returns whether all are finished. `in_time` stops parts."""
    numbers, kept = path.with_suffix(".json"), dict[str, Any]()
    if numbers.exists():
        before = json.loads(numbers.read_text())
        same = before["about"] is not None and all(before["about"].get(key) == value for key, value in facts.items())
        kept = {name: part for name, part in before["parts"].items() if same and "seconds" in part}
    found = {"about": facts | {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": _commit()}, "parts": kept}
    for name, (part, budget_s) in PARTS.items():
        if name in kept:
            print(f"{name}: kept", file=sys.stderr, flush=True)
            continue
        started, result = time.perf_counter(), dict[str, Any](rows=[])
        kept[name] = result
        try:
            with stopped_after(budget_s if in_time else 0):
                for row in part(bench):
                    result["rows"].append(row)
                    write(found, path)
            result["seconds"] = round(time.perf_counter() - started, 1)
        except Exception as error:  # whatever it is, the page says it, and the other parts are measured
            result["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"{name}: {result.get('error') or result['seconds']}", file=sys.stderr, flush=True)
        write(found, path)
        gc.collect()
    return all("seconds" in part for part in kept.values())


def write(found: dict[str, Any], path: Path) -> None:
    """Write the page and its numbers, so that a kill leaves the old files or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in ((path.with_suffix(".json"), json.dumps(found, indent=1) + "\n"), (path, page(found))):
        file.with_name(f".{file.name}.tmp").write_text(text)
        file.with_name(f".{file.name}.tmp").replace(file)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure a GPU with random weights in SD3.5-Medium's shapes.")
    parser.add_argument("--page", type=Path, help=f"default: {PAGE.relative_to(ROOT)}, or {TINY_PAGE.relative_to(ROOT)} with --tiny")
    parser.add_argument("--peak-tflops", type=float, metavar="TFLOP/S", help="dense bf16 peak of a device that the table does not know")
    parser.add_argument("--tiny", action="store_true", help="run every part in small on the CPU")
    given = parser.parse_args(arguments)
    try:
        device = device_of("cpu" if given.tiny else "cuda")
    except MachineError:
        need = "make bench-gpu needs a CUDA GPU and a torch that finds it, and here is none"
        print(f"{need}; run it where nvidia-smi lists one, or test the script with --tiny", file=sys.stderr)
        return MachineError.exit_code
    facts = about(device, given.peak_tflops)
    with tempfile.TemporaryDirectory(prefix="flashgen-gpu-") as folder:
        bench = Bench(device, TINY if given.tiny else SD35_MEDIUM, Path(folder), facts["peak_flop_per_s"])
        page_file = given.page or (TINY_PAGE if given.tiny else PAGE)
        return 0 if measure(bench, page_file, facts, in_time=not given.tiny) else 1  # a test must not depend on how busy a CPU is


if __name__ == "__main__":
    sys.exit(main())
