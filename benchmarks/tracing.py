"""Tracing networks of one structure once per process, for tests and `benchmarks.crash`, which export the same networks dozens of times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnx_ir import Model

from flashgen.families.graphs import Component

Trace = Callable[[Component], Model]


def traced_once(trace: Trace) -> Trace:
    """`trace` with a memory: a network of a structure that was traced before gives a copy of that graph.

    Weights do not matter: `export.write` puts them into the graph afterwards.
    """
    graphs: dict[str, Model] = {}

    def traced(part: Component) -> Model:
        net = part.module.net
        named = (*net.named_parameters(), *net.named_buffers(), *part.inputs.items())
        tensors = [(name, value.shape, value.dtype) for name, value in named]
        processors = [getattr(module, "processor", None).__class__ for module in net.modules()]
        key = str(
            [part.name, part.module.call.__code__, part.outputs, part.dynamic, getattr(net, "config", None), net, tensors, processors]
        )
        if key not in graphs:
            graphs[key] = trace(part)
        return graphs[key].clone()

    return traced


def trace_ahead(trace: Trace, quantized: Path) -> None:
    """Call `trace` on the networks of a quantized version as `flashgen export` prepares them."""
    from flashgen.artifact.store import open_artifact
    from flashgen.export.codes import put_factors, read_codes
    from flashgen.models.pipeline import load_pipeline

    artifact = open_artifact(quantized)
    sampler = artifact.manifest.sampler
    assert sampler is not None
    pipe = load_pipeline(artifact.path)
    put_factors(pipe.transformer, read_codes(artifact), artifact.path)
    for part in pipe.family.export_components(pipe, sampler):
        if part.name == "transformer":
            pipe.family.prepare_export(part.module.net, pipe.family.latent_shape(pipe.configs, sampler.size_px))
        part.module.to("meta")
        trace(part)
