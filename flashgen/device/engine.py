"""Engines that run exported networks: onnxruntime everywhere, OpenVINO where it is installed. One network is in memory at a time."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path
from flashgen.device.graph import MEND
from flashgen.device.memory import out_of_memory
from flashgen.errors import ArtifactError, FlashgenError, MachineError, UsageError, one_line
from flashgen.pixels import require_finite
from flashgen.progress import warn
from flashgen.runtime.environment import number
from flashgen.runtime.memory import cpu_count
from flashgen.runtime.timing import Laps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]
DRAWING = ("transformer", "vae_encoder", "vae_decoder")  # components that run on the chosen engine; text encoders run on onnxruntime
LEAST_ONNXRUNTIME = [1, 24]  # as in pyproject.toml: 1.20 to 1.22 refuse layers of 8 bits or fail while they draw, 1.23 has no 2 bits
COMPILED = 8  # compiled networks that the user's cache keeps, at most: a transformer and a decoder of four artifacts
GROUP = 128  # activations that share a scale in OpenVINO's 8 bits: 32 to 256 are alike, without groups the accuracy drops


class Network(Protocol):
    """One open component: the shapes of its inputs by name (None: any size), the names of its outputs, and a call of it."""

    inputs: dict[str, list[int | None]]
    outputs: list[str]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs called `outputs` for the inputs `feeds`."""


def open_session(model: Path, threads: int | None = None) -> InferenceSession:
    """A CPU session on `threads` threads (None: `default_threads`) that frees memory instead of pooling it."""
    import onnxruntime as ort

    if [int(part) for part in re.findall(r"\d+", ort.__version__)[:2]] < LEAST_ONNXRUNTIME:
        least = ".".join(map(str, LEAST_ONNXRUNTIME))
        raise MachineError(f"onnxruntime {ort.__version__} is installed, and exports need {least} or newer: pip install -U onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    # x86 without VNNI adds products of int8 in 16 bits, which overflow. This entry makes the weights unsigned: slower, and exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception types have no common base
        raise _broken("onnxruntime", model, error) from error


def default_threads() -> int:
    """OMP_NUM_THREADS, or the number of processors that this process may use."""
    return number("OMP_NUM_THREADS") or cpu_count()


def _broken(engine: str, model: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{engine} cannot load {model} ({one_line(error)}); check it with: flashgen show {model.parents[1]} --verify")


class OnnxRuntimeNetwork:
    """A component in onnxruntime. `rounded` and `key` have no effect: the graph itself fixes the arithmetic, and nothing is compiled."""

    def __init__(self, model: Path, threads: int | None, rounded: bool, key: str = "") -> None:
        self.session = open_session(model, threads)
        self.inputs = {put.name: [n if isinstance(n, int) else None for n in put.shape] for put in self.session.get_inputs()}
        self.outputs = [put.name for put in self.session.get_outputs()]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """As `Network.run`."""
        return [np.asarray(value) for value in self.session.run(list(outputs), dict(feeds))]


class OpenVinoNetwork:
    """A component in OpenVINO, in fp32. `rounded` allows bf16, where the processor has it, and 8-bit activations for quantized weights.

    Compiling takes seconds per gigabyte. With a `key` the compiled network is kept in the user's cache.
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
            try:  # the compile cache is optional: on any failure, compile without it
                self.model = core.compile_model(str(model), "CPU", hints)
            except RuntimeError as error:
                raise _broken("openvino", model, error) from error
        self.inputs = {p.get_any_name(): [n.get_length() if n.is_static else None for n in p.partial_shape] for p in self.model.inputs}
        self.outputs = [put.get_any_name() for put in self.model.outputs]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """As `Network.run`."""
        results = self.model(dict(feeds))
        return [np.array(results[name]) for name in outputs]  # copies: the engine reuses its own buffers


def compiled(key: str) -> Path | None:
    """Folder of the user's cache for a compiled component; the folders used longest ago are removed. None if it cannot be written."""
    folder = cache_path("openvino") / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        others = sorted((path for path in folder.parent.iterdir() if path != folder), key=lambda path: path.stat().st_mtime)
        for old in others[: 1 - COMPILED]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:  # another process may change the folder at the same time
        return None
    return folder


NETWORKS: dict[str, Callable[[Path, int | None, bool, str], Network]] = {"onnxruntime": OnnxRuntimeNetwork, "openvino": OpenVinoNetwork}


class Engine:
    """Runs the components of one exported artifact. Opening a component closes the one before.

    The files of a component are compared with the manifest before it is opened: weights of another artifact can have the right size.
    With `falls_back` any failure of another engine than onnxruntime is a warning, and onnxruntime continues.
    Raises UsageError for an engine that is not installed, and ArtifactError for files that are not the manifest's.
    """

    def __init__(self, artifact: Artifact, laps: Laps | None = None, name: str = "onnxruntime", falls_back: bool = False) -> None:
        if find_spec(name) is None:
            raise UsageError(f"--engine {name} is not installed; install it with: pip install 'flashgen[{name}]'")
        self._artifact, self.path, self.name, self.falls_back = artifact, artifact.path, name, falls_back
        self.laps = laps or Laps()
        self._files = {file.path: file.sha256 for file in artifact.manifest.files}
        # Artifacts exported at accuracy level 4 already accept 8-bit activations, so bf16 is allowed for them too.
        self._rounded = artifact.manifest.extra.get("accuracy_level") == 4
        self._open: tuple[str, Network] | None = None

    def network(self, component: str) -> Network:
        """The open network of `component`."""
        if self._open is None or self._open[0] != component:
            self._open = None
            if f"{component}/model.onnx" not in self._files:
                raise ArtifactError(f"{self.path}: its manifest names no {component}; take the artifact from its source again")
            self._artifact.verify(folder=f"{component}/")
            with self.laps.lap("load"):
                self._open = component, self._load(component)
        return self._open[1]

    def run(self, component: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs of `component` for `feeds`.

        Raises ArtifactError for inputs and outputs that its graph does not have, and NumericsError for outputs that are not finite.
        """
        network = self.network(component)
        if wrong := sorted({*feeds} ^ {*network.inputs} | {*outputs} - {*network.outputs}):
            raise ArtifactError(f"{self.path}: {component} and its description do not agree on {wrong[0]!r}; {MEND}")
        try:
            with self.laps.lap(component):
                values = network.run(outputs, feeds)
                require_finite(all(bool(np.isfinite(value).all()) for value in values), f"{component} of {self.path}")
                return values
        except Exception as error:  # the engines' exception types have no common base
            if component == "vae_decoder" and out_of_memory(error):
                raise  # the sampler decodes in smaller tiles
            self._fall_back(component, error)
        return self.run(component, outputs, feeds)

    def close(self) -> None:
        """Free the open network."""
        self._open = None

    def _load(self, component: str) -> Network:
        # Text encoders run once per prompt, so loading decides, and onnxruntime loads faster. Their errors would stay in all steps.
        name = self.name if component in DRAWING else "onnxruntime"
        try:
            return NETWORKS[name](self.path / component / "model.onnx", None, self._rounded, self._key(component))
        except Exception as error:
            self._fall_back(component, error)
        return self._load(component)

    def _fall_back(self, component: str, error: Exception) -> None:
        """Switch to onnxruntime; where that is not allowed or not possible, raise `error` as one for users."""
        if not self.falls_back or self.name == "onnxruntime" or component not in DRAWING:
            if isinstance(error, FlashgenError):
                raise error
            if out_of_memory(error):
                raise MachineError(f"{component} ran out of memory ({one_line(error)}); use a smaller --batch, or --memory") from error
            mend = f"check it with: flashgen show {self.path} --verify"
            raise ArtifactError(f"{self.name} failed in {component} of {self.path} ({one_line(error)}); {mend}") from error
        warn(f"{self.name} failed in {component} ({one_line(error)}); onnxruntime continues (--engine decides otherwise)")
        self.name, self._open = "onnxruntime", None

    def _key(self, component: str) -> str:
        """Name in the user's cache: changes with the component's place and with its content."""
        files = sorted(f"{name} {digest}" for name, digest in self._files.items() if name.startswith(f"{component}/"))
        return hashlib.sha256("\n".join([str(self.path.resolve()), *files]).encode()).hexdigest()[:16]
