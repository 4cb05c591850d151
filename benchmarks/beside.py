"""Times data-free `quantize` alone and beside a program that keeps one processor busy, at SD3.5-Medium's width with random weights.

    python -m benchmarks.beside artifacts/beside              # 3 of 24 layers: minutes; needs 5 GB of disk
    python -m benchmarks.beside artifacts/beside --layers 24  # the whole size: half an hour; needs 40 GB of disk

Run it while nothing else runs. Bars: beside at most 2.2 x the time alone, and alone at most 240 s for all 24 layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from math import prod
from pathlib import Path

FLASHGEN = [sys.executable, "-m", "flashgen"]
RATIO_BAR, ALONE_BAR_S, LAYERS = 2.2, 240, 24


def quantize_s(source: Path, out: Path, busy: bool) -> float:
    """Seconds of a whole process of `flashgen quantize`, beside an endless loop if `busy`."""
    with ExitStack() as stack:
        if busy:
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(loop.kill)
        started = time.perf_counter()
        settings = ["--recipe", "sd35-medium-24gb", "--set", "quantize.encoder_bits=0", "--set", "bench.per_task=0"]
        subprocess.run([*FLASHGEN, "quantize", str(source), *settings, "--out", str(out), "--force"], check=True)
        return time.perf_counter() - started


def num_weights(source: Path) -> int:
    """Number of the transformer's weights that become codes."""
    from flashgen import families
    from flashgen.models.rewrite import linear_shapes

    return sum(map(prod, linear_shapes(source, "transformer", families.get("sd3")).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source = args.folder / f"random-{args.layers}"
    subprocess.run(
        [*FLASHGEN, "teacher", "random", "--like", "sd35-medium", "--layers", str(args.layers), "--out", str(source)], check=True
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.rounds):
        for busy, taken in seconds.items():
            taken.append(round(quantize_s(source, args.folder / "int4", busy), 1))
    alone, beside = (statistics.median(taken) for taken in seconds.values())
    count = num_weights(source / "latest")
    report = {"weights": count, "alone_s": seconds[False], "beside_s": seconds[True], "ratio": round(beside / alone, 2)}
    if args.layers < LAYERS:
        report["extrapolated_alone_s"] = round(alone * LAYERS / args.layers)
    print(json.dumps(report | {"bars": {"ratio": RATIO_BAR, "alone_s": ALONE_BAR_S}}))


if __name__ == "__main__":
    main()
