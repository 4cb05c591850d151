"""Times the full way from prompt to PNG, each run in a process of its own: flashgen's device artifacts and its peers.

    python -m benchmarks.job artifacts/fullsize artifacts/shapes      # `make bench-job`

SD3.5-Medium's size with random weights, 512 px, from the artifacts of `make fullsize`. All draw without T5 (diffusers with zeros in its
place, as its users do to save memory). diffusers draws in 28 steps with guidance; it runs `FEW`, and the time of its last step counts for
each of the others. stable-diffusion.cpp draws in 4 steps without guidance, as flashgen does, from flashgen's own GGUF.
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
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fullsize import PROMPT, RECIPE, page_of, replace, run

# Nothing heavy is imported here: a child's peak starts with its parent's memory, see benchmarks.fullsize.
FEW, STEPS, GUIDANCE, SIZE_PX, ROUNDS, OUR_STEPS = 3, 28, 4.5, 512, 3, 4
CLIP_G = "clip_g.safetensors"
FLASHGEN = [sys.executable, "-m", "flashgen"]
LARGE, SMALL = "SD3.5-Medium's shapes, 512 px", "shapes, 64 px"
ARTIFACTS = {
    "device": "INT4", "device-level4": "INT4, 8-bit activations", "device-int8": "INT8, 8-bit activations",
    "device-tiny": "INT8, 8-bit activations, tiny decoder",
}  # fmt: skip
Lap = dict[str, Any]  # seconds of a whole process, its peak_rss_mib, and phases: seconds by name


class Way(NamedTuple):
    """One row: `lap` runs it once. `once`: in the first round only, for it takes minutes."""

    name: str
    lap: Callable[[], Lap]
    once: bool = False


def diffusers(folder: str, dtype: str, few: str, size_px: str, tokens: str, out: str) -> Lap:
    """Draw with diffusers in this process; `more` are the seconds that the steps would add that are not run."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    started = time.perf_counter()
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=getattr(torch, dtype))
    ends = [time.perf_counter()]

    def ended(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return kept

    picture = pipe(
        PROMPT, num_inference_steps=int(few), guidance_scale=GUIDANCE, height=int(size_px), width=int(size_px),
        max_sequence_length=int(tokens), callback_on_step_end=ended, generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    phases = {"load": ends[0] - started, "step": ends[-1] - ends[-2], "decode": time.perf_counter() - ends[-1]}
    picture.save(out)
    return {"more": (STEPS - int(few)) * phases["step"], "phases": phases}


def merge_shards(folder: str, file: str) -> Lap:
    """Write the weights of a network as one file, since stable-diffusion.cpp reads no shards."""
    from safetensors.torch import load_file, save_file

    save_file({name: value for part in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(part).items()}, file)
    return {}


def sdcpp(folder: str, clip_g: str, gguf: str, kind: str, out: str) -> Lap:
    """Draw with stable-diffusion.cpp in this process, all weights of type `kind`."""
    from stable_diffusion_cpp import StableDiffusion

    started, threads = time.perf_counter(), int(os.environ["OMP_NUM_THREADS"])
    laps: list[tuple[int, float]] = []
    pipe = StableDiffusion(
        diffusion_model_path=gguf, clip_l_path=f"{folder}/text_encoder/model.safetensors",
        clip_g_path=clip_g, vae_path=f"{folder}/vae/diffusion_pytorch_model.safetensors",
        wtype=kind, n_threads=threads, vae_decode_only=True, diffusion_flash_attn=True, vae_conv_direct=True,
    )  # fmt: skip
    loaded = time.perf_counter()
    pictures = pipe.generate_image(
        PROMPT, width=SIZE_PX, height=SIZE_PX, cfg_scale=1.0, sample_steps=OUR_STEPS, sample_method="euler", seed=0,
        progress_callback=lambda step, steps, seconds: laps.append((steps, time.perf_counter())),
    )  # fmt: skip
    drawn = time.perf_counter()
    pictures[0].save(out)
    ends = [end for steps, end in laps if steps == OUR_STEPS]
    return {"phases": {"load": loaded - started, "steps": ends[-1] - ends[0], "decode": drawn - ends[-1]}}


def phases(artifact: str, engine: str) -> Lap:
    """Draw with flashgen in this process; seconds by phase."""
    from flashgen.artifact.store import open_artifact
    from flashgen.device.sampler import DevicePipeline

    pipe = DevicePipeline(open_artifact(artifact), engine=engine)
    pipe.sample([PROMPT], [0])
    laps = dict(pipe.engine.laps.seconds)
    steps = laps.pop("transformer")
    text = sum(sum(seconds) for name, seconds in laps.items() if name.startswith("text_encoder"))
    seconds = {"load": sum(laps["load"]), "text": text, "first step": steps[0], "other steps": sum(steps[1:]) / len(steps[1:])}
    return {"phases": seconds | {"decode": laps["decode"][0]}}


def write_page(target: str) -> Lap:
    """Write the page beside its numbers, in a process of its own, since it imports torch."""
    replace(Path(target), page(json.loads(Path(target).with_suffix(".json").read_text()), Path(target).stem))
    return {}


CHILDREN: dict[str, Callable[..., Lap]] = {
    "-diffusers": diffusers,
    "-sdcpp": sdcpp,
    "-phases": phases,
    "-merge": merge_shards,
    "-page": write_page,
}


def child(name: str, *given: object) -> Lap:
    """Run one of `CHILDREN` in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "benchmarks.job", name, *map(str, given)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("\n".join([f"{name} ended with code {done.returncode}", *done.stderr.strip().splitlines()[-3:]]))
    lap: Lap = json.loads(done.stdout.splitlines()[-1])
    lap["seconds"] = time.perf_counter() - started + lap.pop("more", 0.0)
    return lap


def peer(name: str, *given: object) -> Lap:
    """As `child`, with a path for the picture as its last argument."""
    with tempfile.TemporaryDirectory() as scratch:
        return child(name, *given, Path(scratch, "job.png"))


def ours(artifact: Path, engine: str) -> Lap:
    """`flashgen generate`, whole."""
    peak, seconds = run([*FLASHGEN, "generate", str(artifact), PROMPT, "--engine", engine, "-o", str(artifact.parent / "job.png")])
    return {"seconds": seconds, "peak_rss_mib": peak}


def prepare(full: Path, folders: Sequence[str]) -> None:
    """Write those of the artifacts `folders` that `make fullsize` does not make, and the GGUF; finished ones are up to date."""
    int8 = ["quantize.bits=8", "quantize.group=channel", "quantize.symmetric=true"]
    tiny = [f"restructure.decoder.{one}" for one in ("iterations=1", "batch=1", "held_out=1", "psnr_floor_db=0")]  # weights cost no time
    tiny += ["restructure.prompts=1", "restructure.floor=0", f"prompts_file={full / 'prompts.txt'}"]
    stages: dict[str, list[tuple[str, str, str, list[str]]]] = {  # in the order in which they need each other
        "device-level4": [("export", "int4", "device-level4", ["export.accuracy_level=4"])],
        "device-int8": [("quantize", "slim", "int8", int8), ("export", "int8", "device-int8", [])],
        "device-tiny": [
            ("restructure-encoder", "slim", "tiny", tiny), ("quantize", "tiny", "int8-tiny", int8),
            ("export", "int8-tiny", "device-tiny", []),
        ],
        "gguf": [("export", "slim", "gguf", [])],
    }  # fmt: skip
    for folder in (*folders, "gguf"):
        for stage, source, out, settings in stages.get(folder, []):
            options = [word for setting in settings for word in ("--set", setting)]
            options += {"tiny": ["--mode", "decoder"], "gguf": ["--target", "gguf"]}.get(out, [])
            run([*FLASHGEN, stage, str(full / source), *RECIPE, *options, "--out", str(full / out)])
    if not (full / CLIP_G).exists():
        child("-merge", full / "random" / "latest" / "text_encoder_2", full / CLIP_G)


def ways(full: Path, folders: Sequence[str]) -> list[Way]:
    """The rows at SD3.5-Medium's size, for what this machine has; of flashgen those of the artifacts `folders`."""
    from flashgen.runtime.processor import this_processor

    random, dtypes = full / "random" / "latest", ["float32", *["bfloat16"] * this_processor().has_bf16]
    rows = [
        Way(f"diffusers, torch {dtype}, {STEPS} steps with guidance", partial(peer, "-diffusers", random, dtype, FEW, SIZE_PX, 256), True)
        for dtype in dtypes
    ]
    if find_spec("stable_diffusion_cpp"):
        gguf, clip_g = full / "gguf" / "latest" / "transformer" / "model.gguf", full / CLIP_G
        rows += [
            Way(f"stable-diffusion.cpp {kind}, {OUR_STEPS} steps", partial(peer, "-sdcpp", random, clip_g, gguf, kind), True)
            for kind in ("q8_0", "q4_0")
        ]
    engines = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO", "auto": "auto"}
    return rows + [
        Way(f"flashgen {ARTIFACTS[folder]}, {engines[engine]}, {OUR_STEPS} steps", partial(ours, full / folder, engine))
        for folder in folders
        for engine in engines
        if (folder != "device" or engine == "onnxruntime") and (engine != "auto" or folder == "device-int8")
    ]


def measure(full: Path, shapes: Path, rounds: int, folders: Sequence[str], write: Callable[[list[Lap]], None]) -> None:
    """Pass the rows of the page to `write` after every lap.

    `full` and `shapes` are the folders of `make fullsize` and `make shapes` (or `make demo`).
    """
    prepare(full, folders)
    teacher = Path("flashgen/worlds/shapes/teacher")
    small = [
        Way(f"diffusers, torch float32, {STEPS} steps with guidance", partial(peer, "-diffusers", teacher, "float32", STEPS, 64, 16)),
        Way("flashgen INT4, onnxruntime, 4 steps", partial(ours, shapes / "device", "onnxruntime")),
    ]
    jobs = {SMALL: small, LARGE: ways(full, folders)}
    laps: dict[tuple[str, str], list[Lap]] = {}
    shutil.rmtree(full / "cache", ignore_errors=True)
    for job, own in jobs.items():
        for number in range(rounds):
            for way in own:
                if number == 0 or not way.once:
                    os.environ["XDG_CACHE_HOME"] = str(full / "cache" / way.name.replace(" ", "-"))  # not shared with the other ways
                    lap = way.lap()
                    if job == LARGE and number == rounds - 1 and way.name.startswith("flashgen") and "auto" not in way.name:
                        lap["phases"] = child("-phases", *way.lap.args)["phases"]  # type: ignore[attr-defined]  # a partial of `ours`
                    laps.setdefault((job, way.name), []).append(lap)
                    print(job, way.name, lap, file=sys.stderr, flush=True)
                    write([summary(*key, found) for key, found in laps.items()])


def summary(job: str, way: str, laps: list[Lap]) -> Lap:
    """A row of the page from the laps of one way. `auto` has tried the engines before its last lap."""
    seconds = [lap["seconds"] for lap in laps]
    middle = seconds[-1] if "auto" in way else sorted(seconds)[len(seconds) // 2]
    row = {"job": job, "way": way, "seconds": middle, "first": seconds[0], "all": seconds, "phases": laps[-1].get("phases", {})}
    return row | {"peak_rss_mib": max(lap["peak_rss_mib"] for lap in laps)}


def page(rows: list[Lap], stem: str) -> str:
    """The report in Markdown; its numbers are in the file `stem`.json."""
    from benchmarks.compression_page import cells, table
    from benchmarks.device_page import machine

    lines = [
        "# From prompt to picture",
        "",
        f"`make bench-job` writes this page and [its raw numbers]({stem}.json): a process from its start to the PNG, one picture, two",
        "threads, interleaved, medians of rounds (of two the slower). SD3.5-Medium has random weights (`make fullsize`) and no T5:",
        f"diffusers uses zeros in its place. There diffusers ran {FEW} of its {STEPS} steps, once, and the time of the last step counts",
        f"for each of the others. stable-diffusion.cpp draws flashgen's GGUF in {OUR_STEPS} steps without guidance, once; its seconds",
        "include reading and rounding the weights (load), and its steps 77 text tokens of zeros. flashgen's first picture is slower: files",
        "are hashed, and OpenVINO compiles the networks and caches the result. `auto` tries an engine per picture at first, so its seconds",
        "are those of the last one.",
        "",
        f"{machine()}.",
    ]
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]
        peers = [row for row in own if not row["way"].startswith("flashgen")]
        heads = [f"times as fast as {row['way'].split(', 4')[0].split(', 28')[0]}" for row in peers]
        lines += ["", f"## {job}", "", *table(["", "seconds", "the first picture", "peak RSS MiB", *heads])]
        for row in own:
            ratios = (f"{other['seconds'] / row['seconds']:.1f}" for other in peers)
            lines.append(cells(row["way"], f"{row['seconds']:.2f}", f"{row['first']:.2f}", f"{row['peak_rss_mib']:.0f}", *ratios))
        if any(row["phases"] for row in own):
            lines += ["", "Seconds by phase; flashgen's are of one more process:", "", *table(["", "phases"])]
            lines += [cells(row["way"], ", ".join(f"{name} {s:.1f}" for name, s in row["phases"].items())) for row in own if row["phases"]]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        lap = CHILDREN[sys.argv[1]](*sys.argv[2:])
        print(json.dumps(lap | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
        parser.add_argument("full", type=Path, help="the folder of make fullsize")
        parser.add_argument("shapes", type=Path, help="the folder of make shapes")
        parser.add_argument("--page", type=Path, help="Markdown file; numbers are written beside it")
        parser.add_argument("--rounds", type=int, default=ROUNDS)
        parser.add_argument("--artifacts", nargs="+", choices=ARTIFACTS, default=[*ARTIFACTS], help="of flashgen; an export takes minutes")
        given = parser.parse_args()
        target = given.page or page_of("job")

        def write(rows: list[Lap]) -> None:
            """Write the page and its numbers; an interrupted run leaves what it has."""
            replace(target.with_suffix(".json"), json.dumps(rows, indent=1))
            child("-page", target)

        measure(given.full, given.shapes, given.rounds, given.artifacts, write)
