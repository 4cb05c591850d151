"""`--engine auto`: the installed engine that is done first with this artifact here, measured once."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path, remember
from flashgen.device.engine import NETWORKS, Array, Engine, default_threads
from flashgen.errors import ArtifactError
from flashgen.progress import say, warn

ENGINES = "engines.json"
ROUNDS = 3


class Seconds(NamedTuple):
    """To load the transformer, what the first step costs beyond the others counted in, and for a step of one picture."""

    load: float
    step: float


def installed() -> list[str]:
    return [name for name in NETWORKS if find_spec(name) is not None]


def choose(artifact: Artifact, steps: int, names: list[str]) -> str:
    """Of `names` the engine that loads the transformer and takes `steps` steps of one picture soonest; says which and why.

    What each takes is measured once and kept in the user's cache. One that cannot load the artifact is left out.
    """
    if len(names) == 1:
        return names[0]
    machine = platform.processor() or platform.machine()
    key = " ".join(["2", artifact.manifest.digest, machine, str(default_threads()), *map(_version, names)])
    known = _read()
    if not known.get(key):
        known[key] = {}
        for name in names:
            try:
                known[key][name] = measure(artifact, name)
            except ArtifactError as error:
                warn(str(error))
        if not known[key]:
            mend = f"check it with: flashgen show {artifact.path} --verify"
            raise ArtifactError(f"{artifact.path} runs on none of {', '.join(names)}; {mend}")
        _keep(known)
    seconds = known[key]
    best = min(seconds, key=lambda name: seconds[name].load + steps * seconds[name].step)
    measured = ", ".join(f"{name} {s.load:.1f} s to load and {1000 * s.step:.0f} ms a step" for name, s in seconds.items())
    say(f"engine: {best} for {steps} steps ({measured}; --engine decides otherwise)")
    return best


def measure(artifact: Artifact, name: str) -> Seconds:
    import_module(name)  # importing is no part of loading
    engine, laps = Engine(artifact, name=name), []
    engine.network("transformer")  # once for nothing: OpenVINO keeps what it compiles
    engine.close()
    feeds = one_step(artifact)
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        engine.run("transformer", ["out_hidden_states"], feeds)
        laps.append(time.perf_counter() - start)
    step = float(np.median(laps[1:]))
    return Seconds(max(laps[0] - step, 0.0), step)


def one_step(artifact: Artifact) -> dict[str, Array]:
    """Inputs of the transformer for one picture, all zeros."""
    width = json.loads((artifact.path / "transformer" / "config.json").read_text())["pooled_projection_dim"]
    sampler, extra = artifact.manifest.sampler, artifact.manifest.extra
    assert sampler is not None
    shapes = {
        "hidden_states": (1, *extra["latent_shape"]),
        "encoder_hidden_states": (1, sampler.clip_tokens + sampler.t5_tokens, int(extra["joint_dim"])),
        "pooled_projections": (1, width),
        "timestep": (1,),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _version(name: str) -> str:
    try:
        return f"{name}-{version(name)}"
    except PackageNotFoundError:
        return name


def _read() -> dict[str, dict[str, Seconds]]:
    """{key: {engine: [load, step]}}; whatever else the file holds counts as nothing."""
    try:
        raw: Any = json.loads(cache_path(ENGINES).read_text())
        return {key: {name: Seconds(*map(float, s)) for name, s in seconds.items() if name in NETWORKS} for key, seconds in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(known: Mapping[str, Any]) -> None:
    file = cache_path(ENGINES)
    if error := remember(file, json.dumps(known, indent=1)):
        say(f"{file} cannot be written ({error.strerror}), so the engines are measured again next time")
