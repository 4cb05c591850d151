"""Load: many prompts, many generations, many raters. Writes docs/load.json; memory is resident memory of the process that does the work.

    python -m benchmarks.load FOLDER [--prompts 20000] [--generations 1000] [--raters 200]      # `make load-test`

* `generate --prompt-file` with SIGINT in the middle and the same command again, for a diffusers layout and an exported artifact (tiny
  random weights): the pictures on disk after the interrupt, and bytes of memory per prompt.
* One process that draws one picture after another.
* The arena, asked by all raters at once: every vote is acknowledged, and on the disk.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from flashgen.arena.study import Settings, Study, build
from flashgen.arena.votes import counted
from flashgen.artifact.store import open_artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.metrics.machine import fingerprint

FLASHGEN = [sys.executable, "-m", "flashgen"]
DRAW = ["--steps", "1", "--batch", "100"]
WARM = 0.2  # share of the work that is left out of a slope: caches and allocators fill
Samples = list[tuple[float, int]]


def slope(samples: Samples) -> float:
    """Bytes of memory per unit of work: least squares over (work done, bytes) after WARM of the work."""
    work, rss = np.asarray(samples, float).T
    late = work >= WARM * work.max()
    return float(np.polyfit(work[late], rss[late], 1)[0])


def run(command: Sequence[str], out: Path, stop_at: int | None = None) -> tuple[int, Samples]:
    """(exit code, samples of (pictures in `out`, bytes)) of a process; SIGINT once `stop_at` pictures are there."""
    samples: Samples = []
    with (out.parent / f"{out.name}.log").open("w") as log:
        # A shell starts its background jobs with SIGINT ignored, which the child would inherit.
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        count = sum(1 for _ in out.glob("*.png")) if out.is_dir() else 0
        try:
            samples.append((count, watched.memory_info().rss))
        except psutil.Error:
            break
        if stop_at is not None and count >= stop_at:
            process.send_signal(signal.SIGINT)
            stop_at = None
        time.sleep(0.5)
    return process.wait(), samples


def prompts(artifact: Path, folder: Path, count: int) -> dict[str, Any]:
    """Row of `generate` with `count` prompts, interrupted at a third."""
    file, out = folder / "prompts.txt", folder / f"{artifact.name}-pictures"
    file.write_text("".join(f"picture number {i}\n" for i in range(count)))
    command = [*FLASHGEN, "generate", str(artifact), "--prompt-file", str(file), "--out", str(out), *DRAW]
    code, _ = run(command, out, count // 3)
    after = sorted(out.glob("*.png"))
    num_decodable = sum(_is_decodable(path) for path in after)
    again, samples = run(command, out)
    done = [(n, rss) for n, rss in samples if n > len(after)]
    return {
        "what": f"generate, {artifact.name}, {count} prompts",
        "exit_interrupted": code,
        "files_after_interrupt": len(after),
        "whole_files_after_interrupt": num_decodable,
        "exit_resumed": again,
        "files": sum(1 for _ in out.glob("*.png")),
        "bytes_per_prompt": slope(done),
        "peak_mib": max(rss for _, rss in samples) / 2**20,
    }


def _is_decodable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError):
        return False
    return True


def generations(artifact: Path, count: int) -> dict[str, Any]:
    """Row of `count` single pictures, drawn by this process."""
    pipeline, process, samples = DevicePipeline(open_artifact(str(artifact))), psutil.Process(), list[tuple[float, int]]()
    files = 0
    for number in range(count):
        pipeline.sample([f"picture number {number}"], [number])
        samples.append((number + 1, process.memory_info().rss))
        files = files if number else process.num_fds()
    return {
        "what": f"{count} generations in one process",
        "bytes_per_picture": slope(samples),
        "open_files_more": process.num_fds() - files,
    }


def arena(folder: Path, raters: int, votes_each: int = 10) -> dict[str, Any]:
    """Row of `raters` who join and vote at the same time."""
    study = Study(build(_bench_folder(folder / "bench", 40), folder / "study", Settings(per_rater=votes_each, gold=0, repeats=0)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([*FLASHGEN, "arena", "serve", str(study.folder), "--port", str(port)], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    server.stderr.readline()
    acknowledged: list[tuple[str, str]] = []
    samples: Samples = []

    def post(what: str, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{what}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def rate(number: int) -> None:
        me = {"name": f"rater {number}", "token": f"{number:032d}"}
        for comparison in post("join", me)["comparisons"]:
            post("vote", {**me, "comparison": comparison["id"], "choice": "left", "seconds": 1.0})
            acknowledged.append((me["name"], comparison["id"]))
            samples.append((len(acknowledged), watched.memory_info().rss))

    watched = psutil.Process(server.pid)
    start = time.perf_counter()
    with ThreadPoolExecutor(raters) as pool:
        list(pool.map(rate, range(raters)))
    seconds = time.perf_counter() - start
    server.terminate()
    server.communicate(timeout=60)
    on_disk = {(row["rater"], row["comparison"]) for row in counted(study)}
    return {
        "what": f"arena, {raters} raters at once",
        "acknowledged": len(acknowledged),
        "lost": len(set(acknowledged) - on_disk),
        "votes_per_s": len(acknowledged) / seconds,
        "bytes_per_vote": slope(sorted(samples)),
    }


def _bench_folder(folder: Path, count: int) -> Path:
    """A folder as `bench` writes it, with pictures of two artifacts."""
    results = []
    for number, name in enumerate(("low", "high")):
        pictures = folder / "pictures" / f"{number:02d}-{name}"
        pictures.mkdir(parents=True)
        for item in range(count):
            Image.fromarray(np.full((64, 64, 3), (90 * number, item, 60), np.uint8)).save(pictures / f"{item:04d}.png")
        results.append({"artifact": name, "name": name, "pictures": str(pictures.relative_to(folder))})
    items = [{"prompt": f"prompt {i}", "seed": i, "task": None} for i in range(count)]
    (folder / "bench.json").write_text(json.dumps({"version": 1, "prompts": items, "results": results}))
    return folder


def artifacts(folder: Path) -> tuple[Path, Path]:
    """(diffusers layout, exported) of tiny random weights."""
    teacher, device = folder / "tiny", folder / "tiny-device"
    subprocess.run([*FLASHGEN, "teacher", "random", "--like", "tiny", "--out", str(teacher)], check=True, stdout=sys.stderr)
    subprocess.run([*FLASHGEN, "export", str(teacher), "--recipe", "shapes-demo", "--out", str(device)], check=True, stdout=sys.stderr)
    return teacher, device


def main() -> None:
    """Measure every row and write docs/load.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=20000)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--raters", type=int, default=200)
    parser.add_argument("--page", type=Path, default=Path("docs/load.json"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    teacher, device = artifacts(options.folder)
    parts: list[Callable[[], dict[str, Any]]] = [
        lambda: prompts(teacher, options.folder, options.prompts),
        lambda: prompts(device, options.folder, options.prompts),
        lambda: generations(device, options.generations),
        lambda: arena(options.folder, options.raters),
    ]
    rows = []
    for part in parts:
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in part().items()})
        print(rows[-1], flush=True)
    command = f"python -m benchmarks.load {options.folder}"
    options.page.write_text(json.dumps({"machine": fingerprint(), "command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
