"""`--engine auto`: the installed engine that finishes a job first, by a measurement that is made once and costs less than it can save.

A measurement loads the transformer and runs a step on each engine, about as much as two steps and two loads of the job itself. Of what
was measured, OpenVINO takes 0.5 to 1 times onnxruntime's seconds (docs/device.md), so at best half the job is saved. Hence:

* A job is measured only if half of its steps takes longer than the measurement, by an estimate from the size of the transformer's file:
  never below 9 steps, and small networks only for hundreds of steps.
* Engines are measured in processes of their own, onnxruntime first. Any other has half of the job's measured time; then it is stopped.
* A job that is not measured runs on OpenVINO if the artifact allows rounded activations (accuracy level 4), where OpenVINO takes 0.6 times
  onnxruntime's seconds with loading included (docs/job.md), and on onnxruntime otherwise, where the two take the same time per step and
  OpenVINO loads longer.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from flashgen.artifact.store import Artifact, open_artifact
from flashgen.cache import cache_path, remember
from flashgen.device.engine import NETWORKS, Engine, default_threads
from flashgen.device.graph import read_graph
from flashgen.errors import FlashgenError, MachineError
from flashgen.progress import say, warn
from flashgen.runtime.processes import end_with_parent

ENGINES = "engines.json"
FORMAT = "2"  # of the keys in ENGINES
BYTES_PER_S = 150e6  # of a transformer's file, in one load or one step: INT4 of SD3.5-Medium's size on two cores (docs/job.md)
START_S = 1.0  # a process that imports an engine
LONGEST_S = 600.0  # for onnxruntime, with which nothing can be compared yet


class Seconds(NamedTuple):
    """Seconds to load the transformer (with what only the first step costs), and per step of one picture."""

    load: float
    step: float


def installed() -> list[str]:
    """Names of the installed engines, onnxruntime first."""
    return [name for name in NETWORKS if find_spec(name) is not None]


def choose(artifact: Artifact, steps: int, names: list[str]) -> str:
    """The engine of `names` that loads the transformer and takes `steps` steps of one picture soonest; prints which and why.

    Measurements are kept in the user's cache. An engine that fails or is too slow is left out with a warning.
    """
    if len(names) == 1:
        return names[0]
    machine = platform.processor() or platform.machine()
    key = " ".join([FORMAT, artifact.manifest.digest, machine, str(default_threads()), *map(_version, names)])
    cached = _read()
    if not cached.get(key) and is_worth_measuring(artifact, steps):
        cached[key] = _measure_all(artifact, steps, names)
        _keep(cached)
    seconds = cached.get(key)
    if not seconds:
        rounded = artifact.manifest.extra.get("accuracy_level") == 4 and "openvino" in names
        best = "openvino" if rounded else next(name for name in NETWORKS if name in names)
        say(f"engine: {best} (not measured for {steps} steps; --engine decides otherwise)")
        return best
    best = min(seconds, key=lambda name: seconds[name].load + steps * seconds[name].step)
    measured = ", ".join(f"{name} {s.load:.1f} s to load and {1000 * s.step:.0f} ms per step" for name, s in seconds.items())
    say(f"engine: {best} for {steps} steps ({measured}; --engine decides otherwise)")
    return best


def is_worth_measuring(artifact: Artifact, steps: int) -> bool:
    """Return True if half of `steps` steps is estimated to take longer than a load and a step on each of two engines."""
    size = sum(file.size for file in artifact.manifest.files if file.path.startswith("transformer/model.onnx"))
    step_s = size / BYTES_PER_S
    return steps / 2 * step_s > 2 * (START_S + 2 * step_s)


def _measure_all(artifact: Artifact, steps: int, names: list[str]) -> dict[str, Seconds]:
    seconds: dict[str, Seconds] = {}
    for name in sorted(names, key=[*NETWORKS].index):
        job_s = [s.load + steps * s.step for s in seconds.values()]
        try:
            seconds[name] = measure(artifact, name, 2 * START_S + min(job_s) / 2 if job_s else LONGEST_S)
        except Exception as error:  # whatever an engine does, there is another one
            warn(f"{name} is left out: {error or type(error).__name__}")
    return seconds


def measure(artifact: Artifact, name: str, deadline_s: float) -> Seconds:
    """Seconds of the engine `name`, measured in a process of its own, which is stopped after `deadline_s`.

    Raises MachineError when the process fails, or has not finished a step by then.
    """
    search = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "flashgen.device.choice", str(artifact.path), name]
    try:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": os.pathsep.join(search)}, timeout=deadline_s, capture_output=True, text=True
        )
        out, why = done.stdout, (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as late:
        out, why = (late.stdout or b"").decode(), f"no step was done in {deadline_s:.1f} s, after which it can save nothing"
    lines = [line for line in out.splitlines() if line.startswith("[") and line.endswith("]")]
    if not lines:
        raise MachineError(f"{name} cannot be measured: {why}")
    return Seconds(*map(float, json.loads(lines[-1])))


def print_measurement(artifact: Artifact, name: str) -> None:
    """Print a line `[load, step]` after one step, and a more exact one after a second step: the first one may prepare weights."""
    import_module(name)  # importing is no part of loading
    engine = Engine(artifact, name=name)
    engine.network("transformer")  # OpenVINO compiles here, once per artifact, and loads what it compiled from then on
    engine.close()
    graph = read_graph(artifact)
    feeds = graph.zero_feeds(engine.network("transformer").inputs)
    load = engine.laps.seconds["load"][-1]
    for _ in range(2):
        engine.run("transformer", [graph.transformer.output], feeds)
        first, *later = engine.laps.seconds["transformer"]
        step = min([first, *later])
        print(json.dumps([load + first - step, step]), flush=True)


def _version(name: str) -> str:
    try:
        return f"{name}-{version(name)}"
    except PackageNotFoundError:
        return name


def _read() -> dict[str, dict[str, Seconds]]:
    """{key: {engine: seconds}} of the cache; a file with other content counts as empty."""
    try:
        raw: Any = json.loads(cache_path(ENGINES).read_text())
        return {key: {name: Seconds(*map(float, s)) for name, s in seconds.items() if name in NETWORKS} for key, seconds in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(cached: Mapping[str, Any]) -> None:
    file = cache_path(ENGINES)
    if error := remember(file, json.dumps(cached, indent=1)):
        say(f"{file} cannot be written ({error.strerror}), so the engines are measured again next time")


if __name__ == "__main__":
    end_with_parent()
    try:
        print_measurement(open_artifact(sys.argv[1]), sys.argv[2])
    except (FlashgenError, RuntimeError, MemoryError) as error:
        sys.exit(f"{error or type(error).__name__}")
