"""`--engine auto`: the installed engine that finishes a job first, by the seconds that earlier jobs took. Nothing is run just to be timed.

* Each job's seconds, to load the transformer and per step, are kept in the user's cache by artifact, processor, threads and engine.
* The first job of an artifact runs on the engine that was measured to be fastest for such artifacts on such processors (`RATIOS`).
* A later job tries an engine that has not drawn this artifact here, if half of the job takes longer on the best known engine than the other
  needs to be imported and to compile, and `RATIOS` does not expect it to be slower. When the other one has taken as long as the whole job
  takes on the best known engine, that one continues.
* OpenVINO in bf16 and with 8-bit activations count as two engines, where the artifact allows rounding and the processor has both.
* Compiling is needed once, so an engine that has had one job is not judged by what its load took, if another one loads faster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path, remember
from flashgen.device.engine import NETWORKS, default_threads, may_round
from flashgen.device.providers import INT8, Choice, Spent, Target, target_of
from flashgen.device.wide import transformer_bytes
from flashgen.progress import say
from flashgen.runtime.processor import this_processor

ENGINES = "engines.json"
FORMAT = "3"  # of the keys in ENGINES
BYTES_PER_S = 150e6  # of a transformer's file, in one load, compilation or step: INT4 of SD3.5-Medium on two cores (docs/job-vnni.md)
START_S = 1.0  # importing an engine
# Seconds of a step on OpenVINO over those on onnxruntime, by kind of processor and of artifact: docs/device-*.md, docs/lab-log.md.
RATIOS: Mapping[tuple[str, str], float] = {
    ("amx", "fp32"): 0.82, ("amx", "int4"): 0.93, ("amx", "int4 rounded"): 0.34, ("amx", "int8"): 0.31,
    ("vnni", "fp32"): 0.89, ("vnni", "int4"): 0.95, ("vnni", "int4 rounded"): 0.54, ("vnni", "int8"): 0.88,
    ("avx2", "int8"): 1.59, ("avx2", "static int8"): 1.78,  # fp32 1.05, int4 1.12, int4 rounded 1.05: within the noise
}  # fmt: skip
WORTH = 0.9  # a ratio for which OpenVINO is worth being installed, and comes first
OPENVINO_INT8 = str(Target("openvino", INT8))
NAMES = (*NETWORKS, OPENVINO_INT8)


class Seconds(NamedTuple):
    """Seconds to load the transformer, with what only the first step costs, and per step of one row; and the number of jobs."""

    load: float
    step: float
    jobs: int = 1


def installed(artifact: Artifact) -> list[str]:
    """Names of the installed engines that can differ in speed for the artifact on this processor, onnxruntime first."""
    processor, names = this_processor(), [name for name in NETWORKS if find_spec(name) is not None]
    if "openvino" in names and processor.kind in ("vnni", "amx") and processor.has_bf16 and may_round(artifact):
        names.append(OPENVINO_INT8)
    return names


def choose(artifact: Artifact, steps: int, names: Sequence[str]) -> Choice:
    """The engine of `names` for a job of `steps` steps of one row; prints which and why."""
    ratio = RATIOS.get((this_processor().kind, kind_of(artifact)))
    known = {name: s for name, s in known_seconds(artifact).items() if name in names}
    totals, size = _totals(known, steps), transformer_bytes(artifact)
    best = min(totals, key=lambda name: totals[name], default=names[0])
    seconds = totals.get(best, (1 + steps) * size / BYTES_PER_S)
    pays = seconds / 2 > START_S + size / BYTES_PER_S
    worth = pays and ratio is not None and ratio < WORTH
    if worth and find_spec("openvino") is None:
        say(f"openvino would do a step about {1 / (ratio or 1):.1f} times as fast here: pip install 'flashgen[openvino]'")
    if len(names) == 1:
        return Choice(best)
    if not totals and worth and "openvino" not in known:
        best = "openvino"
    measured = ", ".join(f"{name} {s.load:.1f} s to load and {1000 * s.step:.0f} ms per step" for name, s in known.items() if s)
    slower = None if ratio is None else "openvino" if ratio > 1 else "onnxruntime"
    other = next((name for name in names if name not in {*known, best, slower}), None)
    if totals and pays and other:
        say(f"engine: {other}, for the first time here ({measured}; --engine decides otherwise)")
        _update(artifact, {other: None})  # should the engine end this process, then it is not tried again
        return Choice(other, best, seconds)
    say(f"engine: {best} for {steps} steps ({measured or 'not measured yet'}; --engine decides otherwise)")
    return Choice(best, "" if best == "onnxruntime" else "onnxruntime")


def kind_of(artifact: Artifact) -> str:
    """Kind of arithmetic of a transformer: static int8, int8 (dynamic), int4 rounded (8-bit activations), int4 or fp32, as in `RATIOS`."""
    graph = b""  # without the file the engine says what is wrong
    with suppress(OSError):
        graph = (artifact.path / "transformer" / "model.onnx").read_bytes()  # weights of large graphs are in another file
    names = {"DequantizeLinear": "static int8", "DynamicQuantizeMatMul": "int8", "MatMulNBits": "int4"}
    kind = next((kind for name, kind in names.items() if name.encode() in graph), "fp32")
    return f"{kind} rounded" if kind == "int4" and may_round(artifact) else kind


def learn(artifact: Artifact, spent: Mapping[str, Spent]) -> None:
    """Keep the least seconds per engine that this job and earlier ones took; other work on the machine only adds to them."""
    known, news = known_seconds(artifact), dict[str, Seconds | None]()
    for name, job in spent.items():
        if name not in NAMES or not (job.loads_s and job.steps_s):
            continue
        per_row = [seconds / rows for seconds, rows in zip(job.steps_s, job.rows, strict=True)]
        step = median(per_row[1:] or per_row)
        new = Seconds(min(job.loads_s) + max(0.0, job.steps_s[0] - step * job.rows[0]), step)
        old = known.get(name) or Seconds(math.inf, math.inf, 0)
        news[name] = Seconds(min(old.load, new.load), min(old.step, new.step), old.jobs + 1)
    _update(artifact, news)


def known_seconds(artifact: Artifact) -> dict[str, Seconds | None]:
    """{engine: seconds} of earlier jobs of this artifact on this processor; None for an engine that ended the process.

    A cache with other content counts as empty.
    """
    named = {f"{name} {_version(name)}": name for name in NAMES}
    try:
        stored = _read()[_key(artifact)].items()
        return {named[key]: s and Seconds(float(s[0]), float(s[1]), int(s[2])) for key, s in stored if key in named}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return {}


def _totals(known: Mapping[str, Seconds | None], steps: int) -> dict[str, float]:
    """Seconds of a job of `steps` steps by engine."""
    seconds = {name: s for name, s in known.items() if s}
    least = min((s.load for s in seconds.values()), default=0.0)
    return {name: (least if s.jobs == 1 else s.load) + steps * s.step for name, s in seconds.items()}


def _key(artifact: Artifact) -> str:
    return " ".join([FORMAT, artifact.manifest.digest, this_processor().name, str(default_threads())])


def _version(name: str) -> str:
    try:
        return version(target_of(name).engine)
    except PackageNotFoundError:
        return "?"


def _read() -> dict[str, Any]:
    try:
        raw = json.loads(cache_path(ENGINES).read_text())
        return raw if isinstance(raw, dict) else {}
    except (OSError, ValueError):
        return {}


def _update(artifact: Artifact, news: Mapping[str, Seconds | None]) -> None:
    """Add `news` to what the user's cache has of this artifact."""
    cached, key, file = _read(), _key(artifact), cache_path(ENGINES)
    old = cached.get(key)
    cached[key] = (old if isinstance(old, dict) else {}) | {f"{name} {_version(name)}": seconds for name, seconds in news.items()}
    if error := remember(file, json.dumps(cached, indent=1)):
        say(f"{file} cannot be written ({error.strerror}), so the seconds of this job are not kept")
