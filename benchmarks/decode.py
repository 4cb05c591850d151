"""Times decoding at SD3.5-Medium's size: its VAE against the tiny decoder, as exported, on onnxruntime and OpenVINO.

    python -m benchmarks.decode artifacts/decode-bench --page docs/decode.md      # `make bench-decode`

Random weights, one picture, `OMP_NUM_THREADS` threads. Both decoders of an engine are open in one process and decode in turns. The peak of
memory is that of a process of its own that decodes one picture, of at most `PEAK_PX`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compression_page import cells, table
from benchmarks.device_page import machine
from flashgen.device.engine import NETWORKS, Network, default_threads
from flashgen.progress import say

DECODERS, ENGINES, SIZES = ("vae", "tiny"), ("onnxruntime", "openvino"), (256, 512, 768, 1024)
ROUNDS, THREADS, PEAK_PX, FACTOR = 3, 2, 512, 8
BARS, GOALS = {"onnxruntime": 0.4, "openvino": 0.7}, {"onnxruntime": 0.15, "openvino": 0.3}  # tiny over VAE at 512 px


def prepare(work: Path) -> None:
    """Export both decoders with random weights, unless `work` has them."""
    import torch
    from diffusers import AutoencoderKL

    from flashgen.export.write import write_graph
    from flashgen.families.graphs import Call, Component
    from flashgen.families.sd3.specs import spec
    from flashgen.models.tiny_decoder import new_tiny_decoder, tiny_component

    if (work / "done").exists():
        return
    torch.manual_seed(0)
    config = spec("sd35-medium").vae
    vae, z = AutoencoderKL(**config).eval().requires_grad_(False), torch.randn(2, config["latent_channels"], 32, 32)
    call = Call(vae, lambda net, z: net.decode(z, return_dict=False)[0])
    part = Component("vae_decoder", call, {"latent_sample": z}, ("sample",), {"latent_sample": {2: "height", 3: "width"}})
    tiny = tiny_component(part, new_tiny_decoder(config["latent_channels"], FACTOR, 64, 3, 0), config)
    for name, component in (("vae", part), ("tiny", tiny)):
        write_graph(component, {}, work / name)
    (work / "done").touch()


def opened(work: Path, engine: str, decoder: str) -> Network:
    """One decoder on one engine."""
    return NETWORKS[engine](work / decoder / "vae_decoder" / "model.onnx")


def lap(network: Network, size_px: int) -> tuple[float, float]:
    """Seconds of decoding one square picture: wall time, and time of all processors."""
    side = size_px // FACTOR
    z = np.random.default_rng(0).standard_normal((1, 16, side, side)).astype(np.float32)
    started = time.perf_counter(), time.process_time()
    network.run(["sample"], {"latent_sample": z})
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(work: Path, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of the page: seconds of each decoder by engine and size."""
    rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        networks = {decoder: opened(work, engine, decoder) for decoder in DECODERS}
        for network in networks.values():
            lap(network, 64)
        for size_px in sizes:
            laps: dict[str, list[tuple[float, float]]] = {decoder: [] for decoder in DECODERS}
            for _ in range(rounds):
                for decoder, network in networks.items():
                    laps[decoder].append(lap(network, size_px))
            say(f"{engine} {size_px} px: {laps}")
            wall, cpu = ({decoder: float(np.median(each, 0)[clock]) for decoder, each in laps.items()} for clock in (0, 1))
            ratios = {"ratio": wall["tiny"] / wall["vae"], "cpu_ratio": cpu["tiny"] / cpu["vae"]}
            rows.append({"engine": engine, "size_px": size_px, "seconds": wall, "cpu_s": cpu, **ratios, "all": laps})
        del networks
        for row in rows:
            if row["engine"] == engine and row["size_px"] <= PEAK_PX:
                row["peak_rss_mib"] = {decoder: peak(work, engine, decoder, row["size_px"]) for decoder in DECODERS}
    return rows


def peak(work: Path, engine: str, decoder: str, size_px: int) -> float:
    """Peak memory in MiB of a process that decodes one square picture."""
    command = [sys.executable, "-m", "benchmarks.decode", str(work), "--peak", engine, decoder, "--sizes", str(size_px)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def page(rows: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    rounds = len(rows[0]["all"]["vae"])
    lines = [
        "# Decoding", "",
        "`make bench-decode` writes this page and [its raw numbers](decode.json): SD3.5-Medium's VAE and a tiny decoder in TAESD3's shapes",
        "(64 channels), random weights, as `export` writes them, one picture. Both decode in turns in one process per engine;",
        "where other programs run, the ratio of CPU time says more than that of seconds;",
        f"medians of {rounds}. Bars for the ratio at 512 px: {BARS['onnxruntime']} on onnxruntime and {BARS['openvino']} on OpenVINO, goals"
        f" {GOALS['onnxruntime']} and {GOALS['openvino']}.", "", f"{machine()}; threads: {default_threads()}.", "",
        *table(["engine", "picture, px", "VAE, s", "tiny decoder, s", "ratio", "ratio of CPU time", "VAE, peak MiB", "tiny, peak MiB"]),
    ]  # fmt: skip
    for row in rows:
        seconds = (f"{row['seconds'][decoder]:.2f}" for decoder in DECODERS)
        peaks = (f"{row['peak_rss_mib'][decoder]:.0f}" if "peak_rss_mib" in row else "" for decoder in DECODERS)
        lines.append(cells(row["engine"], str(row["size_px"]), *seconds, f"{row['ratio']:.3f}", f"{row['cpu_ratio']:.3f}", *peaks))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export the decoders, measure them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for the models")
    parser.add_argument("--page", type=Path, default=Path("docs/decode.md"), help="Markdown file; numbers are written beside it")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="PX")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", nargs=2, metavar=("ENGINE", "DECODER"), help="decode one picture here and print the peak in MiB")
    given = parser.parse_args()
    if given.peak:
        from flashgen.runtime.memory import peak_rss_mib

        lap(opened(given.work, *given.peak), given.sizes[0])
        print(peak_rss_mib())
        return
    prepare(given.work)
    rows = measure(given.work, given.sizes, given.rounds)
    given.page.with_suffix(".json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    given.page.write_text(page(rows))


if __name__ == "__main__":
    main()
