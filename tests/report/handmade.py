"""A bench.json with everything in it, and noisy pictures, for tests of the report."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

NAMES = ["teacher", "student", "finetuned", "slim", "device-int4", "device-fp32"]
TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange"]


def result(index: int, name: str, prompts: int) -> dict[str, Any]:
    seconds = [9.6, 1.42, 1.38, 1.21, 0.54, 0.83][index % 6]
    score = [0.94, 0.91, 0.92, 0.89, 0.86, 0.9][index % 6]
    mib = [31.2, 31.2, 31.2, 22.4, 4.75, 22.1][index % 6]
    around = {"total_p50": [seconds * 0.95, seconds * 1.06], "step_p50": [seconds / 5, seconds / 3.8]}
    overall = {"overall": score} | {task: round(score - 0.05 + 0.1 * ((7 * i + index) % 6) / 6, 3) for i, task in enumerate(TASKS)}
    return {
        "artifact": f"artifacts/demo/{name}",
        "name": name,
        "engine": "torch" if index < 4 else "onnxruntime",
        "device": "cpu",
        "threads": 2,
        "size_px": "512x512",
        "steps": 28 if index == 0 else 4,
        "size_mib": mib,
        "bytes": {"transformer": int(mib * 0.8 * 2**20), "vae_decoder": int(mib * 0.2 * 2**20)},
        "lineage": [
            {"stage": stage, "path": f"artifacts/demo/{name}", "version": f"v000{i + 1}", "digest": f"{i}{index}" * 32, "seed": i}
            for i, stage in enumerate(["export", "quantize", "distill", "teacher"][: index + 1])
        ],
        "latency_s": {
            "cold": seconds + 3, "load": 0.4, "encode": 0.031, "step_p50": seconds / 4.2, "step_p95": seconds / 3.9, "decode": 0.11,
            "total_p50": seconds,
        },
        "latency_interval_s": around,
        "peak_rss_mib": 812.4 - 90 * index,
        "peak_phase_mib": {"load": 300.0, "encode": 420.0, "step": 812.4 - 90 * index, "decode": 512.0},
        "quality": {"composition": overall, "fid": {"overall": 12.5 + 3 * index}, "clip_score": "not judged"},
        "quality_interval": {
            "composition": {part: [value - 0.02, value + 0.02] for part, value in overall.items()},
            "fid": {"overall": [11.0 + 3 * index, 14.5 + 3 * index]},
        },
        "quality_of": {
            "composition": {"judge": {"metric": "composition", "world": "shapes"}, "pictures": prompts, "higher_is_better": True},
            "fid": {"judge": {"metric": "fid", "weights": "ab" * 32}, "pictures": prompts, "higher_is_better": False},
        },
        "values": {"composition": [float((i + index) % 5 > 0) for i in range(prompts)]},
        "fidelity": None
        if index == 0
        else {
            "reference": "teacher",
            "psnr_db": {"mean": 24.0 - index, "interval": [23.5 - index, 24.4 - index]},
            "ssim": {"mean": 0.91 - index / 50, "interval": [0.8, 0.95]},
        },
        "pictures": f"pictures/{index:02d}-{name}",
    }  # fmt: skip


def bench(artifacts: int = 6, prompts: int = 24) -> dict[str, Any]:
    return {
        "version": 1,
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.70GHz",
            "cores": 2,
            "system": "Linux-6.1.0-x86_64-with-glibc2.36",
            "python": "3.11.9",
            "versions": {"flashgen": "0.3.0", "onnxruntime": "1.23.0"},
            "noise": {"spread": 0.021, "noisy": False},
        },
        "command": "flashgen bench artifacts/demo/teacher artifacts/demo/student --recipe shapes-demo --out artifacts/demo/bench",
        "settings": {"seed": 7, "per_task": 4, "warmup": 1, "repeats": 5},
        "prompts": [
            {
                "prompt": f"a {COLORS[i % 6]} circle left of a {COLORS[(i + 2) % 6]} square on a white background",
                "seed": 7 + i,
                "task": TASKS[i % 6],
            }
            for i in range(prompts)
        ],
        "results": [result(index, NAMES[index % 6], prompts) for index in range(artifacts)],
    }


def picture(artifact: int, prompt: int, side: int) -> Image.Image:
    """Two shapes on a gradient under noise: as many bytes as a photograph."""
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    shift = side * (artifact + prompt % 3) // 40
    draw.ellipse((side // 10 + shift, side // 4, side // 2 - side // 20 + shift, side * 3 // 5), COLORS[prompt % 6])
    draw.rectangle((side // 2 + shift, side // 2, side * 4 // 5 + shift, side * 4 // 5), COLORS[(prompt + 2) % 6])
    light = np.linspace(0.75, 1.0, side, dtype=np.float32)[:, None, None]
    noise = np.roll(_noise(side), 37 * (7 * prompt + artifact), (0, 1))
    return Image.fromarray(np.clip(np.asarray(canvas) * light + noise, 0, 255).astype(np.uint8))


@cache
def _noise(side: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 14, (side, side, 3)).astype(np.float32)


def write(out: Path, artifacts: int = 6, prompts: int = 24, side: int = 512) -> dict[str, Any]:
    """bench.json and pictures/ in `out`; returns what the file holds."""
    data = bench(artifacts, prompts)
    for index, row in enumerate(data["results"]):
        folder = out / row["pictures"]
        folder.mkdir(parents=True)
        for prompt in range(prompts):
            picture(index, prompt, side).save(folder / f"{prompt:04d}.png", compress_level=0)
    (out / "bench.json").write_text(json.dumps(data))
    return data
