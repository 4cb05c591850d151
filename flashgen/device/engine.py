"""What runs an exported network: onnxruntime everywhere, OpenVINO where it is installed. One network in memory at a time."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say
from flashgen.timing import Laps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]
ENGINES = ("auto", "onnxruntime", "openvino")
ROUNDS = 3


class Network(Protocol):
    """One open component: the names of its outputs, and a run of some of them."""

    outputs: list[str]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]: ...


def open_session(model: Path, threads: int | None = None) -> InferenceSession:
    """A CPU session on `threads` threads (default: OMP_NUM_THREADS or all cores) that gives memory back instead of pooling it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception types have no common base
        raise _broken("onnxruntime", model, error) from error


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1


def _broken(engine: str, model: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{engine} cannot load {model} ({error}); check it with: flashgen show {model.parents[1]} --verify")


class OnnxRuntimeNetwork:
    def __init__(self, model: Path, threads: int | None) -> None:
        self.session = open_session(model, threads)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        return [np.asarray(value) for value in self.session.run(list(outputs), dict(feeds))]


class OpenVinoNetwork:
    """The same file; the transformer in bf16 where the processor multiplies it, encoders and decoder in fp32."""

    def __init__(self, model: Path, threads: int | None) -> None:
        import openvino as ov

        core = ov.Core()
        half = model.parent.name == "transformer" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hints = {"INFERENCE_NUM_THREADS": threads or _threads(), "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
        try:
            self.model = core.compile_model(str(model), "CPU", hints | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128 if half else 0})
        except RuntimeError as error:
            raise _broken("openvino", model, error) from error
        self.outputs = [output.get_any_name() for output in self.model.outputs]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        found = self.model(dict(feeds))
        return [np.array(found[name]) for name in outputs]  # the engine reuses its own buffers


NETWORKS: dict[str, Callable[[Path, int | None], Network]] = {"onnxruntime": OnnxRuntimeNetwork, "openvino": OpenVinoNetwork}


class Engine:
    """Runs the components of one exported artifact. Opening a component closes the one before.

    Raises UsageError for an engine that is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None, laps: Laps | None = None, name: str = "onnxruntime") -> None:
        if find_spec(name) is None:
            raise UsageError(f"--engine {name} is not installed; install it with: pip install 'flashgen[{name}]'")
        self.path, self.threads, self.name = path, threads, name
        self.laps = laps or Laps()
        self._open: tuple[str, Network] | None = None

    def network(self, component: str) -> Network:
        if self._open is None or self._open[0] != component:
            self._open = None
            with self.laps.lap("load"):
                self._open = (component, NETWORKS[self.name](self.path / component / "model.onnx", self.threads))
        return self._open[1]

    def run(self, component: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        network = self.network(component)
        with self.laps.lap(component):
            return network.run(outputs, feeds)


def choose(path: Path, digest: str, feeds: Mapping[str, Array], threads: int | None = None) -> str:
    """The engine that runs this artifact's transformer faster here, measured once and kept in the user's cache; says which and why.

    `feeds` are one step's inputs.
    """
    installed = [name for name in NETWORKS if find_spec(name) is not None]
    if len(installed) == 1:
        return installed[0]
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashgen" / "engines.json"
    key = " ".join([digest, platform.processor() or platform.machine(), str(threads or _threads()), *map(_version, installed)])
    try:
        known: dict[str, dict[str, float]] = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = {name: _step_seconds(name, path / "transformer" / "model.onnx", feeds, threads) for name in installed}
        _keep(file, known)
    seconds = known[key]
    best = min(seconds, key=lambda name: seconds[name])
    measured = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    say(f"engine: {best} (a step here: {measured}; --engine decides otherwise)")
    return best


def _version(name: str) -> str:
    try:
        return f"{name}-{version(name)}"
    except PackageNotFoundError:
        return name


def _step_seconds(name: str, model: Path, feeds: Mapping[str, Array], threads: int | None) -> float:
    network, laps = NETWORKS[name](model, threads), []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        network.run(["out_hidden_states"], feeds)
        laps.append(time.perf_counter() - start)
    return float(np.median(laps[1:]))


def _keep(file: Path, known: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, file)
    except OSError as error:
        say(f"{file} cannot be written ({error.strerror}), so the engines are measured again next time")
