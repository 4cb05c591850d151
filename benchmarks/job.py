"""Times the full way from prompt to PNG, each run in a process of its own: flashgen's device artifacts and diffusers in fp32.

    python -m benchmarks.job artifacts/fullsize artifacts/shapes --page docs/job.md      # `make bench-job`

SD3.5-Medium's size with random weights, 512 px, from the artifacts of `make fullsize`. diffusers draws without T5 (with zeros in its place,
as its users do to save memory) in 28 steps with guidance; it runs `FEW` steps, and the time of its last step counts for each of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.fullsize import PROMPT, RECIPE, replace, run

# Nothing heavy is imported here: a child's peak starts with its parent's memory, see benchmarks.fullsize.
FEW, STEPS, GUIDANCE, SIZE_PX, ROUNDS = 3, 28, 4.5, 512, 3
FLASHGEN = [sys.executable, "-m", "flashgen"]


def diffusers_fp32(folder: str, few: int, size_px: int, tokens: int, out: str) -> None:
    """Draw with diffusers; print the seconds that the other steps would add, and the peak in MiB."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    ends: list[float] = []

    def ended(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return kept

    picture = pipe(
        PROMPT, num_inference_steps=few, guidance_scale=GUIDANCE, height=size_px, width=size_px, max_sequence_length=tokens,
        callback_on_step_end=ended,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    picture.save(out)
    more = (STEPS - few) * (ends[-1] - ends[-2]) if few < STEPS else 0.0
    print(json.dumps({"more": more, "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def peer(folder: Path, few: int, size_px: int, tokens: int) -> dict[str, Any]:
    """Seconds and peak of diffusers."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        given = [str(folder), str(few), str(size_px), str(tokens), str(Path(scratch, "job.png"))]
        done = subprocess.run([sys.executable, "-m", "benchmarks.job", "-diffusers", *given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("\n".join([f"diffusers ended with code {done.returncode}", *done.stderr.strip().splitlines()[-1:]]))
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": time.perf_counter() - started + found["more"], "peak_rss_mib": found["peak_rss_mib"]}


def ours(artifact: Path, engine: str) -> dict[str, Any]:
    """Seconds and peak of `flashgen generate`."""
    peak, seconds = run([*FLASHGEN, "generate", str(artifact), PROMPT, "--engine", engine, "-o", str(artifact.parent / "job.png")])
    return {"seconds": seconds, "peak_rss_mib": peak}


def measure(full: Path, shapes: Path) -> list[dict[str, Any]]:
    """Rows of the page; `full` and `shapes` are the folders of `make fullsize` and `make shapes`."""
    level4, int8 = full / "device-level4", full / "device-int8"
    run([*FLASHGEN, "export", str(full / "int4"), *RECIPE, "--set", "export.accuracy_level=4", "--out", str(level4)])
    speed = ("quantize.bits=8", "quantize.group=channel", "quantize.symmetric=true")
    run([*FLASHGEN, "quantize", str(full / "slim"), *RECIPE, *(part for s in speed for part in ("--set", s)), "--out", str(full / "int8")])
    run([*FLASHGEN, "export", str(full / "int8"), *RECIPE, "--out", str(int8)])
    teacher = Path("flashgen/worlds/shapes/teacher")
    jobs: dict[str, list[tuple[str, Any]]] = {
        "SD3.5-Medium's shapes, 512 px": [
            ("diffusers, torch fp32, 28 steps with guidance", lambda: peer(full / "random" / "latest", FEW, SIZE_PX, 256)),
            ("flashgen INT4, onnxruntime, 4 steps", lambda: ours(full / "device", "onnxruntime")),
            ("flashgen INT4, 8-bit activations, onnxruntime, 4 steps", lambda: ours(level4, "onnxruntime")),
            ("flashgen INT4, 8-bit activations, OpenVINO, 4 steps", lambda: ours(level4, "openvino")),
            ("flashgen INT8, 8-bit activations, onnxruntime, 4 steps", lambda: ours(int8, "onnxruntime")),
            ("flashgen INT8, 8-bit activations, OpenVINO, 4 steps", lambda: ours(int8, "openvino")),
        ],
        "shapes, 64 px": [
            ("diffusers, torch fp32, 28 steps with guidance", lambda: peer(teacher, STEPS, 64, 16)),
            ("flashgen INT4, onnxruntime, 4 steps", lambda: ours(shapes / "device", "onnxruntime")),
        ],
    }  # fmt: skip
    rows = []
    shutil.rmtree(full / "cache", ignore_errors=True)
    for job, ways in jobs.items():
        laps: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in ways}
        for number in range(ROUNDS):
            for name, way in ways:
                if number == 0 or "diffusers" not in name or job.startswith("shapes"):  # a run takes minutes, and the bar is 30 x
                    os.environ["XDG_CACHE_HOME"] = str(full / "cache" / name.replace(" ", "-"))  # not shared with the other ways
                    laps[name].append(way())
                    print(job, name, laps[name][-1], file=sys.stderr, flush=True)
        slowest = sorted(lap["seconds"] for lap in laps[ways[0][0]])[len(laps[ways[0][0]]) // 2]
        for name, found in laps.items():
            seconds = sorted(lap["seconds"] for lap in found)
            middle = seconds[len(seconds) // 2]
            rows.append({
                "job": job, "way": name, "seconds": middle, "first": found[0]["seconds"], "all": seconds, "times_faster": slowest / middle,
                "peak_rss_mib": max(lap["peak_rss_mib"] for lap in found),
            })  # fmt: skip
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    from benchmarks.compression_page import cells, table
    from benchmarks.device_page import machine

    lines = [
        "# From prompt to picture",
        "",
        "`make bench-job` writes this page and [its raw numbers](job.json): a process from its start to the PNG, one picture, two threads,",
        "interleaved, medians of up to three. SD3.5-Medium's shapes have random weights (`make fullsize`) and no T5: diffusers uses zeros",
        f"in its place. There diffusers ran {FEW} of its 28 steps, once, and the time of the last step counts for each of the others. The",
        "first picture is slower: files are hashed, and OpenVINO compiles the networks and caches the result.",
        "",
        f"{machine()}.",
    ]
    for job in dict.fromkeys(row["job"] for row in rows):
        lines += ["", f"## {job}", "", *table(["", "seconds", "the first picture", "times faster", "peak RSS MiB"])]
        lines += [
            cells(r["way"], f"{r['seconds']:.2f}", f"{r['first']:.2f}", f"{r['times_faster']:.1f}", f"{r['peak_rss_mib']:.0f}")
            for r in rows
            if r["job"] == job
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["-diffusers"]:
        folder, few, size_px, tokens, out = sys.argv[2:]
        diffusers_fp32(folder, int(few), int(size_px), int(tokens), out)
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
        parser.add_argument("full", type=Path, help="the folder of make fullsize")
        parser.add_argument("shapes", type=Path, help="the folder of make shapes")
        parser.add_argument("--page", type=Path, default=Path("docs/job.md"))
        given = parser.parse_args()
        found = measure(given.full, given.shapes)
        replace(given.page.with_suffix(".json"), json.dumps(found, indent=1))
        replace(given.page, page(found))
