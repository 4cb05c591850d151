"""What runs an exported network: onnxruntime everywhere, OpenVINO where it is installed. One network in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.files import sha256
from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path, remember
from flashgen.errors import ArtifactError, UsageError
from flashgen.timing import Laps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]
COMPILED = 8  # networks whose compiled form the user's cache holds at most, a transformer and a decoder of four artifacts
GROUP = 128  # activations that share a scale in OpenVINO's 8 bits; 32 to 256 are alike, without groups they lose accuracy


class Network(Protocol):
    """One open component: the names of its outputs, and a run of some of them."""

    outputs: list[str]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]: ...


def open_session(model: Path, threads: int | None = None) -> InferenceSession:
    """A CPU session on `threads` threads (default: OMP_NUM_THREADS or all cores) that gives memory back instead of pooling it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    # x86 without VNNI adds products of int8 in 16 bits, which overflow: there weights are made unsigned on loading, slower and exact
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception types have no common base
        raise _broken("onnxruntime", model, error) from error


def default_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1


def _broken(engine: str, model: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{engine} cannot load {model} ({error}); check it with: flashgen show {model.parents[1]} --verify")


class OnnxRuntimeNetwork:
    """`rounded` has no meaning here: the graph itself says how products are computed."""

    def __init__(self, model: Path, threads: int | None, rounded: bool, key: str = "") -> None:
        self.session = open_session(model, threads)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        return [np.asarray(value) for value in self.session.run(list(outputs), dict(feeds))]


class OpenVinoNetwork:
    """The same file, in fp32; `rounded` allows bf16, where the processor has it, and activations of 8 bits before quantized weights.

    Compiling takes seconds a gigabyte, so what it gives is kept in the user's cache under `key`, when that is given.
    """

    def __init__(self, model: Path, threads: int | None, rounded: bool, key: str = "") -> None:
        import openvino as ov

        core = ov.Core()
        half = rounded and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hints: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or default_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if rounded else 0,
        }
        folder = compiled(key) if key else None
        try:
            self.model = core.compile_model(str(model), "CPU", hints | ({"CACHE_DIR": str(folder)} if folder else {}))
        except RuntimeError:
            try:  # whatever is wrong with the cache, a picture can do without
                self.model = core.compile_model(str(model), "CPU", hints)
            except RuntimeError as error:
                raise _broken("openvino", model, error) from error
        self.outputs = [output.get_any_name() for output in self.model.outputs]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        found = self.model(dict(feeds))
        return [np.array(found[name]) for name in outputs]  # the engine reuses its own buffers


def compiled(key: str) -> Path | None:
    """Where the compiled form of a component belongs, the least recently used one gone; None where nothing can be written."""
    folder = cache_path("openvino") / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        others = sorted((path for path in folder.parent.iterdir() if path != folder), key=lambda path: path.stat().st_mtime)
        for old in others[: 1 - COMPILED]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:  # a cache is no reason to fail; another process may be at it, too
        return None
    return folder


NETWORKS: dict[str, Callable[[Path, int | None, bool, str], Network]] = {"onnxruntime": OnnxRuntimeNetwork, "openvino": OpenVinoNetwork}


class Engine:
    """Runs the components of one exported artifact. Opening a component closes the one before.

    A file has the manifest's sha256 before it is used the first time: weights of another artifact can have the right size. The user's
    cache remembers which files had, and they are read again when the file system says that they changed.
    Raises UsageError for an engine that is not installed and ArtifactError for a file that is not the manifest's.
    """

    def __init__(self, artifact: Artifact, laps: Laps | None = None, name: str = "onnxruntime") -> None:
        if find_spec(name) is None:
            raise UsageError(f"--engine {name} is not installed; install it with: pip install 'flashgen[{name}]'")
        self.path, self.name = artifact.path, name
        self.laps = laps or Laps()
        self._files = {file.path: file.sha256 for file in artifact.manifest.files}
        # Whoever exported with 8-bit activations takes that rounding.
        self._rounded = artifact.manifest.extra.get("accuracy_level") == 4
        self._checked: set[str] = set()
        self._open: tuple[str, Network] | None = None

    def network(self, component: str) -> Network:
        if self._open is None or self._open[0] != component:
            self._open = None
            self._check(component)
            with self.laps.lap("load"):
                # Text encoders run once a prompt, so loading decides; and their errors would stay in every step.
                name = "onnxruntime" if component.startswith("text_encoder") else self.name
                model, key = self.path / component / "model.onnx", self._key(component)
                self._open = (component, NETWORKS[name](model, None, self._rounded, key))
        return self._open[1]

    def run(self, component: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        network = self.network(component)
        with self.laps.lap(component):
            return network.run(outputs, feeds)

    def close(self) -> None:
        self._open = None

    def _key(self, component: str) -> str:
        """Of the user's cache: where the component is and what it holds."""
        own = sorted(f"{name} {digest}" for name, digest in self._files.items() if name.startswith(f"{component}/"))
        return hashlib.sha256("\n".join([str(self.path.resolve()), *own]).encode()).hexdigest()[:16]

    def _check(self, component: str) -> None:
        if component in self._checked:
            return
        own = {name: digest for name, digest in self._files.items() if name.startswith(f"{component}/")}
        if f"{component}/model.onnx" not in own:
            raise ArtifactError(f"{self.path}: its manifest names no {component}; take the artifact from its source again")
        known, states = cache_path("checked") / self._key(component), json.dumps([_state(self.path / name) for name in own])
        try:
            seen = known.read_text() == states and sys.platform != "win32"  # which has no time of change
        except (OSError, ValueError):
            seen = False
        for name, digest in own.items():
            if not seen and sha256(self.path / name) != digest:
                raise ArtifactError(
                    f"{self.path}: {name} was altered or comes from another artifact (sha256 differs from the manifest's); "
                    "take the artifact from its source again"
                )
        if not seen:
            remember(known, states)
        self._checked.add(component)


def _state(file: Path) -> tuple[int, int, int]:
    """What changes when a file does; the time of change is the system's own, which copying tools cannot set."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns
