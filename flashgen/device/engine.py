"""Engines that run exported networks: onnxruntime everywhere, OpenVINO where it is installed. One network is in memory at a time."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.store import Artifact
from flashgen.cache import cache_path
from flashgen.device.graph import MEND
from flashgen.device.memory import out_of_memory
from flashgen.device.providers import CPU, INT8, PROVIDERS, Choice, Spent, require, session_on, target_of
from flashgen.device.wide import extension, is_roomy
from flashgen.errors import ArtifactError, FlashgenError, MachineError, one_line
from flashgen.pixels import require_finite
from flashgen.progress import warn
from flashgen.runtime.environment import number
from flashgen.runtime.memory import cpu_count
from flashgen.runtime.timing import Laps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]
Shapes = Mapping[str, Sequence[int]]  # of the inputs of a component, by name
DRAWING = ("transformer", "vae_encoder", "vae_decoder")  # components that run on the chosen engine; text encoders run on onnxruntime
LEAST_ONNXRUNTIME = [1, 24]  # as in pyproject.toml: 1.20 to 1.22 refuse layers of 8 bits or fail while they draw, 1.23 has no 2 bits
FIXED = ("NPU", "qnn")  # devices that compile graphs of fixed shapes only
COMPILED = 8  # compiled networks that the user's cache keeps, at most: a transformer and a decoder of four artifacts
GROUP = 128  # activations that share a scale in OpenVINO's 8 bits: 32 to 256 are alike, without groups the accuracy drops


class Network(Protocol):
    """One open component: the shapes of its inputs by name (None: any size), the names of its outputs, and a call of it."""

    inputs: dict[str, list[int | None]]
    outputs: list[str]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs called `outputs` for the inputs `feeds`."""


@dataclass(frozen=True)
class Opening:
    """How a component is opened.

    `threads`: None for `default_threads`. `where`: as in `Target`. With `shapes` the network is for inputs of these shapes alone. The rest
    but the last is for OpenVINO: `rounded` allows bf16, or 8-bit activations for quantized weights; what is compiled is kept in the user's
    cache under `key`, if there is one; `wide` keeps codes of fewer bits as 8-bit ones on the processor. `overflows` is for onnxruntime:
    products of integers overflow on x86 without VNNI unless it takes another kernel.
    """

    threads: int | None = None
    where: str = ""
    rounded: bool = False
    shapes: Shapes | None = None
    key: str = ""
    wide: bool = False
    overflows: bool = True


def open_session(model: Path, opening: Opening = Opening()) -> InferenceSession:
    """A session of onnxruntime that frees memory instead of pooling it."""
    import onnxruntime as ort

    if [int(part) for part in re.findall(r"\d+", ort.__version__)[:2]] < LEAST_ONNXRUNTIME:
        least = ".".join(map(str, LEAST_ONNXRUNTIME))
        raise MachineError(f"onnxruntime {ort.__version__} is installed, and exports need {least} or newer: pip install -U onnxruntime")
    options, where = ort.SessionOptions(), opening.where
    options.intra_op_num_threads = opening.threads or default_threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = where != "directml"  # DirectML cannot plan memory
    # Makes weights that can overflow unsigned: slower, and exact. To find them, it reads all, 13 seconds per gigabyte.
    options.add_session_config_entry("session.x64quantprecision", str(int(opening.overflows)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1" if where else "0")
    options.log_severity_level = 3
    if opening.shapes is not None:
        for put in open_session(model).get_inputs():
            for axis, size in zip(put.shape, opening.shapes[put.name], strict=True):
                if isinstance(axis, str):
                    options.add_free_dimension_override_by_name(axis, size)
    try:
        return session_on(str(model), options, PROVIDERS.get(where))
    except Exception as error:  # onnxruntime's exception types have no common base
        raise _broken("onnxruntime", model, error) from error


def may_round(artifact: Artifact) -> bool:
    """Return True if engines may round activations: at accuracy level 4 the artifact accepts 8 bits, and so bf16, too."""
    return bool(artifact.manifest.extra.get("accuracy_level") == 4)


def default_threads() -> int:
    """OMP_NUM_THREADS, or the number of processors that this process may use."""
    return number("OMP_NUM_THREADS") or cpu_count()


def _broken(engine: str, model: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{engine} cannot load {model} ({one_line(error)}); check it with: flashgen show {model.parents[1]} --verify")


class OnnxRuntimeNetwork:
    """A component in onnxruntime, whose graph fixes the arithmetic, and which compiles nothing."""

    def __init__(self, model: Path, opening: Opening = Opening()) -> None:
        self.session = open_session(model, opening)
        self.inputs = {put.name: [n if isinstance(n, int) else None for n in put.shape] for put in self.session.get_inputs()}
        self.outputs = [put.name for put in self.session.get_outputs()]
        if opening.where and (left := left_to_the_processor(self.session)):
            names = ", ".join(f"{count} {name}" for name, count in left.most_common())
            warn(f"onnxruntime:{opening.where} leaves operators of {model.parent.name} to the processor: {names}")

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """As `Network.run`."""
        return [np.asarray(value) for value in self.session.run(list(outputs), dict(feeds))]


def left_to_the_processor(session: InferenceSession) -> Counter[str]:
    """How many operators of each type a session on a provider runs on the processor, after its optimizations."""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    return Counter(node.op_type for part in parts for node in part.get_nodes())


class OpenVinoNetwork:
    """A component in OpenVINO: in fp32 on the processor, in fp16 on a GPU or an NPU.

    `rounded` computes in bf16 if the processor has that, else with 8-bit activations for quantized weights. Where `INT8` these are used in
    any case; OpenVINO rounds no activations that are bf16. Compiling takes seconds per gigabyte.
    """

    def __init__(self, model: Path, opening: Opening = Opening()) -> None:
        import openvino as ov

        core, device, shapes = ov.Core(), "CPU" if opening.where in ("", INT8) else opening.where, opening.shapes
        hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f16"}
        if device == "CPU":
            half = opening.rounded and not opening.where and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            hints = {
                "INFERENCE_NUM_THREADS": opening.threads or default_threads(),
                "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if opening.rounded or opening.where == INT8 else 0,
            }
            if opening.wide:
                core.add_extension(extension())
        folder = compiled(f"{opening.key}{'-wide' * opening.wide}") if opening.key else None
        cached = hints | ({"CACHE_DIR": str(folder)} if folder else {})
        try:
            network: Any = str(model)  # by its path a network is found in the cache without being read
            if shapes is not None:
                network = core.read_model(model)
                network.reshape({name: list(shape) for name, shape in shapes.items()})
            try:
                self.model = core.compile_model(network, device, cached)
            except RuntimeError:  # the compile cache is optional: on any failure, compile without it
                self.model = core.compile_model(network, device, hints)
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


NETWORKS: dict[str, Callable[..., Network]] = {"onnxruntime": OnnxRuntimeNetwork, "openvino": OpenVinoNetwork}


class Engine:
    """Runs the components of one exported artifact. Opening a component closes the one before.

    The files of a component are compared with the manifest before it is opened: weights of another artifact can have the right size.
    `spent` has the transformer's seconds by engine. Raises UsageError and MachineError for engines that are unknown or cannot run here,
    and ArtifactError for files that are not the manifest's.
    """

    def __init__(self, artifact: Artifact, laps: Laps | None = None, name: str | Choice = "onnxruntime") -> None:
        choice = name if isinstance(name, Choice) else Choice(name)
        require(target_of(choice.name))
        self._artifact, self.path = artifact, artifact.path
        self.name, self.fallback, self._left_s = choice.name, choice.fallback, choice.deadline_s
        self._wide = not choice.compact and is_roomy(artifact)
        self.laps = laps or Laps()
        self.spent: dict[str, Spent] = {}
        self._files = {file.path: file.sha256 for file in artifact.manifest.files}
        self._rounded = may_round(artifact)
        self._overflows = artifact.manifest.extra.get("overflows") is not False  # manifests of flashgen 0.2 do not say it
        self._open: tuple[str, Shapes | None, Network] | None = None

    def network(self, component: str, feeds: Mapping[str, Array] | None = None) -> Network:
        """The open network of `component`. What is compiled per shape is opened for the shapes of `feeds`, if they are given."""
        fixed = feeds if target_of(self.name).where in FIXED and component in DRAWING else None
        shapes = None if fixed is None else {name: value.shape for name, value in fixed.items()}
        if self._open is None or self._open[0] != component or shapes not in (None, self._open[1]):
            self._open = None
            if f"{component}/model.onnx" not in self._files:
                raise ArtifactError(f"{self.path}: its manifest names no {component}; take the artifact from its source again")
            self._artifact.verify(folder=f"{component}/")
            with self.laps.lap("load"):
                self._open = component, shapes, self._load(component, shapes)
            if component == "transformer":
                self._count(self.laps.seconds["load"][-1], 0)
        return self._open[2]

    def run(self, component: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs of `component` for `feeds`.

        Raises ArtifactError for inputs and outputs that its graph does not have, and NumericsError for outputs that are not finite.
        """
        network = self.network(component, feeds)
        if wrong := sorted({*feeds} ^ {*network.inputs} | {*outputs} - {*network.outputs}):
            raise ArtifactError(f"{self.path}: {component} and its description do not agree on {wrong[0]!r}; {MEND}")
        try:
            with self.laps.lap(component):
                values = network.run(outputs, feeds)
                require_finite(all(bool(np.isfinite(value).all()) for value in values), f"{component} of {self.path}")
            if component == "transformer":
                self._count(self.laps.seconds[component][-1], len(values[0]))
            return values
        except Exception as error:  # the engines' exception types have no common base
            if component == "vae_decoder" and out_of_memory(error):
                raise  # the sampler decodes in smaller tiles
            self._fall_back(component, error)
        return self.run(component, outputs, feeds)

    def close(self) -> None:
        """Free the open network."""
        self._open = None

    def _count(self, seconds: float, rows: int) -> None:
        """Record a step of the transformer of `rows` rows, or a load (0), and leave an engine that has used up its time."""
        spent = self.spent.setdefault(self.name, Spent())
        if not rows:
            spent.loads_s.append(seconds)
        else:
            spent.steps_s.append(seconds)
            spent.rows.append(rows)
        self._left_s -= seconds
        if rows and self._left_s < 0:
            warn(f"{self.name} is slower than {self.fallback}, which continues (--engine decides otherwise)")
            self._switch()

    def _switch(self) -> None:
        self.name, self.fallback, self._open, self._left_s = self.fallback, "", None, math.inf

    def _load(self, component: str, shapes: Shapes | None) -> Network:
        # Text encoders run once per prompt, so loading decides, and onnxruntime loads faster. Their errors would stay in all steps.
        target = target_of(self.name if component in DRAWING else "onnxruntime")
        model, key = self.path / component / "model.onnx", self._key(component, shapes)
        try:
            opening = Opening(None, target.where, self._rounded, shapes, key, self._wide, self._overflows)
            return NETWORKS[target.engine](model, opening)
        except Exception as error:
            self._fall_back(component, error)
        return self._load(component, shapes)

    def _fall_back(self, component: str, error: Exception) -> None:
        """Switch to the fallback; where that is not allowed or not possible, raise `error` as one for users."""
        if not self.fallback or component not in DRAWING:
            if isinstance(error, FlashgenError):
                raise error
            if out_of_memory(error):
                raise MachineError(f"{component} ran out of memory ({one_line(error)}); use a smaller --batch, or --memory") from error
            mend = f"check it with: flashgen show {self.path} --verify"
            raise ArtifactError(f"{self.name} failed in {component} of {self.path} ({one_line(error)}); {mend}") from error
        warn(f"{self.name} failed in {component} ({one_line(error)}); {self.fallback} continues (--engine decides otherwise)")
        self._switch()

    def _key(self, component: str, shapes: Shapes | None) -> str:
        """Name in the user's cache: changes with the component's place, content and shapes."""
        files = sorted(f"{name} {digest}" for name, digest in self._files.items() if name.startswith(f"{component}/"))
        return hashlib.sha256("\n".join([str(self.path.resolve()), *files, str(shapes or "")]).encode()).hexdigest()[:16]
