"""Engines by name, as `--engine` takes them: `onnxruntime`, `onnxruntime:PROVIDER`, `openvino`, `openvino:DEVICE`, `openvino:int8`.

Without a second part an engine computes on the processor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from flashgen.errors import MachineError, UsageError, one_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

CPU = "CPUExecutionProvider"
INT8 = "int8"  # OpenVINO on the processor, with 8-bit activations where it would compute in bf16
# An ONNX model of 61 bytes, y = x + x, for float32 tensors of shape [1]: a provider without a device cannot open it.
PROBE = bytes.fromhex("08083a350a0e0a01780a01781201792203416464120167") + bytes.fromhex(
    "5a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142021011"
)


class Provider(NamedTuple):
    """An execution provider of onnxruntime: its name there, how it is installed, its options, and the module of a plugin."""

    name: str
    install: str
    options: Mapping[str, str] = {}
    plugin: str = ""


PROVIDERS: Mapping[str, Provider] = {
    "cuda": Provider("CUDAExecutionProvider", "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    "directml": Provider("DmlExecutionProvider", "pip uninstall onnxruntime, then pip install onnxruntime-directml (Windows)"),
    "migraphx": Provider("MIGraphXExecutionProvider", "pip uninstall onnxruntime, then pip install onnxruntime-migraphx (AMD, Linux)"),
    "coreml": Provider("CoreMLExecutionProvider", "only onnxruntime for macOS has it", {"ModelFormat": "MLProgram"}),
    "qnn": Provider("QNNExecutionProvider", "pip install onnxruntime-qnn (Snapdragon)", {"backend_type": "htp"}, "onnxruntime_qnn"),
}


class Target(NamedTuple):
    """An engine and where it computes: a key of `PROVIDERS`, a device of OpenVINO, or `INT8`; empty: the processor."""

    engine: str
    where: str = ""

    def __str__(self) -> str:
        """The name that `--engine` takes."""
        return f"{self.engine}:{self.where}" if self.where else self.engine


@dataclass(frozen=True)
class Choice:
    """An engine, the one that continues when it fails, and the seconds of loading and steps after which that one continues, too.

    `compact` is for the least memory: OpenVINO then keeps 4-bit codes as they are, which makes the first step slower.
    """

    name: str = "onnxruntime"
    fallback: str = ""
    deadline_s: float = math.inf
    compact: bool = False


@dataclass
class Spent:
    """Seconds that the transformer has taken on one engine: for each load, and for each step of `rows` rows."""

    loads_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def target_of(name: str) -> Target:
    """The target that `--engine NAME` means. Raises UsageError for a name that no engine has."""
    engine, _, where = name.partition(":")
    known = {"onnxruntime": ("", *PROVIDERS), "openvino": ("", "CPU", INT8, "GPU", "NPU")}
    if where not in known.get(engine, ()) and not (engine == "openvino" and where.startswith("GPU.")):
        names = ", ".join(str(Target(engine, where)) for engine, places in known.items() for where in places)
        raise UsageError(f"--engine {name} is unknown; use one of: {names}")
    return Target(engine, "" if where == "CPU" else where)


@cache
def require(target: Target) -> None:
    """Raise MachineError unless the engine is installed and has the device of `target`, which is tried with a sum of two numbers."""
    if find_spec(target.engine) is None:
        raise MachineError(f'--engine {target} needs {target.engine}, which is not installed: pip install "flashgen[{target.engine}]"')
    if target.engine == "openvino" and target.where not in ("", INT8):
        import openvino

        devices = openvino.Core().available_devices
        if not any(target.where in (device, device.partition(".")[0]) for device in devices):
            raise MachineError(f"--engine {target}: OpenVINO has no such device here, only {', '.join(devices)}; its driver may be missing")
    elif target.engine == "onnxruntime" and target.where:
        import onnxruntime as ort

        try:
            session_on(PROBE, ort.SessionOptions(), PROVIDERS[target.where])
        except Exception as error:  # onnxruntime's exception types have no common base
            here = ", ".join(ort.get_available_providers())
            how = PROVIDERS[target.where].install
            raise MachineError(f"--engine {target} cannot compute here ({one_line(error)}); there is {here}; {how}") from error


def session_on(model: str | bytes, options: SessionOptions, provider: Provider | None) -> InferenceSession:
    """A session of `model` on `provider`, with the processor for operators that the provider lacks; None: the processor alone.

    Raises RuntimeError for a provider that is not installed or has no device here.
    """
    import onnxruntime as ort

    if provider is None:
        return ort.InferenceSession(model, options, providers=[CPU])
    with redirect_stdout(sys.stderr):  # onnxruntime prints what it cannot load
        if provider.plugin:
            devices = _plugin_devices(provider)
            options.add_provider_for_devices(devices, dict(provider.options))
            return ort.InferenceSession(model, options)
        if provider.name not in ort.get_available_providers():
            raise RuntimeError(f"the installed onnxruntime has no {provider.name}")
        if provider.name.startswith("CUDA"):
            ort.preload_dlls()
        places = [(provider.name, dict(provider.options)), CPU]
        session = ort.InferenceSession(model, options, providers=places, enable_fallback=0)
    if provider.name not in session.get_providers():
        raise RuntimeError(f"{provider.name} has no device here")
    return session


def _plugin_devices(provider: Provider) -> list[Any]:
    import onnxruntime as ort

    if find_spec(provider.plugin) is None:
        raise RuntimeError(f"{provider.plugin} is not installed")
    if not any(device.ep_name == provider.name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(provider.name, import_module(provider.plugin).get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
    if not devices:
        raise RuntimeError(f"{provider.name} has no device here")
    return devices
