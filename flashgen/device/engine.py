"""onnxruntime sessions, one in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError
from flashgen.timing import Laps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]


def open_session(model: Path, threads: int | None = None) -> InferenceSession:
    """A CPU session on `threads` threads (default: OMP_NUM_THREADS or all cores) that gives memory back instead of pooling it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception types have no common base
        raise ArtifactError(
            f"onnxruntime cannot load {model} ({error}); check it with: flashgen show {model.parents[1]} --verify"
        ) from error


class Engine:
    """Runs the components of one exported artifact. Opening a component closes the one before."""

    def __init__(self, path: Path, threads: int | None = None, laps: Laps | None = None) -> None:
        self.path = path
        self.threads = threads
        self.laps = laps or Laps()
        self._open: tuple[str, InferenceSession] | None = None

    def session(self, component: str) -> InferenceSession:
        if self._open is None or self._open[0] != component:
            self._open = None
            with self.laps.lap("load"):
                self._open = (component, open_session(self.path / component / "model.onnx", self.threads))
        return self._open[1]

    def run(self, component: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        session = self.session(component)
        with self.laps.lap(component):
            return [np.asarray(value) for value in session.run(list(outputs), dict(feeds))]
