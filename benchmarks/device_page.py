"""The page of `benchmarks.device`: one table per text length, rows ordered by time."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np

from benchmarks.compression_page import cells, table

ABOUT = """
`make bench-device` writes this page and [its raw numbers]({stem}.json). One denoising step of four blocks of SD3.5-Medium's width (two of
them with dual attention), random weights, 512 px, one picture, two threads. Every row runs in a process of its own, the rows of a round
one after another; times are medians of rounds, and spread is (largest - smallest) / median. Error is |out - fp32| / |fp32| against torch
at 333 text tokens; weights are random, so it ranks arithmetic, not pictures. Peak is {peak:.0f} G operations per second: the fastest
matrix product of one engine and number type at the step's own shapes here ({best}; `python -m benchmarks.peak` has all); the share counts
all products of a step, attention included. Peers with an error above {wrong} are not counted as the fastest one."""
WRONG = 0.1  # error of a peer's row whose numbers overflow; the others have .08 at most
HEADS = ["", "step, s", "spread", "over the fastest peer", "over the fastest on onnxruntime", "of peak", "RSS MiB", "MB", "error"]


def page(rows: list[dict[str, Any]], curve: list[dict[str, Any]], peak: float, best: str, stem: str) -> str:
    """The report in Markdown; `curve` has seconds by size, `peak` is in operations per second, reached by `best`.

    Its numbers are in the file `stem`.json.
    """
    rounds = len(rows[0]["step_s_all"])
    lines = [
        "# One step, engine by engine",
        ABOUT.format(peak=peak / 1e9, best=best, stem=stem, wrong=WRONG),
        "",
        f"{rounds} round{'s' * (rounds > 1)} on {machine()}.",
    ]
    for tokens in sorted({row["text_tokens"] for row in rows}):
        own = sorted((row for row in rows if row["text_tokens"] == tokens), key=lambda row: row["step_s"])
        peers = [row for row in own if row["who"] == "peer" and row["error"] <= WRONG]
        fastest, on_ort = peers[0]["step_s"], min(row["step_s"] for row in peers if row["engine"] == "onnxruntime")
        lines += ["", f"## {tokens} text tokens", ""]
        lines += table(HEADS)
        for row in own:
            spread = f"{np.ptp(row['step_s_all']) / row['step_s']:.0%}" if rounds > 1 else ""
            ratios = f"{row['step_s'] / fastest:.2f} x", f"{row['step_s'] / on_ort:.2f} x" if row["engine"] == "onnxruntime" else ""
            name = f"**{row['name']}**" if row["who"] == "flashgen" else row["name"]
            rest = f"{row['share_of_peak']:.2f}", f"{row['peak_rss_mib']:.0f}", f"{row['bytes'] / 1e6:.0f}", f"{row['error']:.4f}"
            lines.append(cells(name, f"{row['step_s']:.2f}", spread, *ratios, *rest))
    engines = list(curve[0]["seconds"])
    lines += ["", "## Sizes", "", "The speed profile at 333 text tokens, best of two steps, one round.", ""]
    lines += table(["picture, px", "G operations", *(f"{engine}, s" for engine in engines), *(f"{engine}, of peak" for engine in engines)])
    for row in curve:
        seconds = [row["seconds"][engine] for engine in engines]
        shares = (f"{row['operations'] / peak / s:.2f}" for s in seconds)
        lines.append(cells(str(row["size_px"]), f"{row['operations'] / 1e9:.0f}", *(f"{s:.2f}" for s in seconds), *shares))
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and system of this machine."""
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"
