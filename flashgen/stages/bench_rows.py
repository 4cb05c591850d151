"""Rows of the bench: every artifact with each engine, number of threads, size and number of steps that it can be drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from flashgen.artifact.store import Artifact
from flashgen.device.providers import require, target_of
from flashgen.errors import MachineError, UsageError
from flashgen.metrics.report import short_names
from flashgen.metrics.worker import Job
from flashgen.pixels import Size
from flashgen.progress import warn
from flashgen.stages.inputs import sampler_of
from flashgen.stages.request import Request, option_size


@dataclass(frozen=True)
class Grid:
    """Settings measured of every artifact. Empty: the artifact's own size and steps, onnxruntime, the engine's number of threads."""

    engines: Sequence[str] = ()
    threads: Sequence[int] = ()
    sizes: Sequence[str] = ()
    steps: Sequence[int] = ()


@dataclass(frozen=True)
class Comparison:
    """References of the rows.

    `reference` is one of the artifacts, as it was named: pictures of the same prompts and seeds are compared with its pictures.
    `baseline` is an earlier bench.json, and `tolerance` the share by which a number may be worse.
    """

    reference: str | None = None
    baseline: Path | None = None
    tolerance: float = 0.1
    lpips_weights: Path | None = None


@dataclass(frozen=True)
class PlannedRow:
    """One row: `job` draws `source`, which the command line names `ref` and tables name `name`."""

    ref: str
    name: str
    source: Artifact
    job: Job
    size: Size
    request: Request

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.job.sigmas) - 1


def plan_rows(refs: Sequence[str], opened: Sequence[Artifact], grid: Grid, device: str) -> list[PlannedRow]:
    """Rows in the order of `refs`, engines, sizes, steps and threads.

    A size or number of steps that one artifact cannot draw is left out there with a warning. Raises UsageError for an artifact that has no
    row left, and for an engine that is unknown or draws none of them; MachineError for one that cannot run here.
    """
    rows = []
    for engine in {*grid.engines} - {"torch"}:
        target_of(engine)
    for ref, name, source in zip(refs, short_names(list(refs)), opened, strict=True):
        sampler = sampler_of(source)
        choices, errors = [], []
        for size, steps in product([option_size(text) for text in grid.sizes or (None,)], grid.steps or (None,)):
            request = Request(["-"], [0], steps=steps, size=size)
            try:
                request.check(source)
                choices.append(request)
            except UsageError as error:
                errors.append(error)
        if not choices:
            raise errors[0]
        for left_out in errors:
            warn(f"no row for {left_out}")
        for engine, request, threads in product(engines_of(source, grid.engines), choices, grid.threads or (None,)):
            size = request.size or sampler.size_px
            own_size = str(size) if engine == "torch" else ""
            job = Job(str(source.path), engine, tuple(request.sigmas(sampler)), own_size, device, threads)
            rows.append(PlannedRow(ref, name, source, job, size, request))
    used = {row.job.engine for row in rows}
    if unused := [engine for engine in grid.engines if engine not in used]:
        kind = (
            "exported artifacts are drawn by onnxruntime or openvino"
            if unused[0] == "torch"
            else "artifacts in diffusers layout are torch's"
        )
        raise UsageError(f"--engine {unused[0]} draws none of the artifacts ({kind}); leave it out")
    for engine in used - {"torch"}:
        require(target_of(engine))
    if "torch" in used and find_spec("torch") is None:
        raise MachineError('this command needs torch, which is not installed: pip install "flashgen[train]"')
    return rows


def engines_of(source: Artifact, engines: Sequence[str]) -> list[str]:
    """The engines that draw `source`, of those named. Raises UsageError for an exported artifact when only torch is named."""
    if source.manifest.kind != "device":
        return ["torch"]
    found = [str(target_of(engine)) for engine in dict.fromkeys(engines) if engine != "torch"]
    if engines and not found:
        raise UsageError(f"--engine torch: {source.path} is exported, so torch cannot draw it; add --engine onnxruntime")
    return found or ["onnxruntime"]
