"""Components as ONNX graphs."""

from __future__ import annotations

import logging
import warnings

import onnx_ir as ir
import torch

from flashgen.families.graphs import Component

TRACE_ROWS = 2  # torch.export takes 0 and 1 for constants


def trace(component: Component) -> ir.Model:
    """Unoptimized ONNX graph of a component, in which every Linear still shows its parameters by name (`net.` + name).

    Its module may be on `meta`: only shapes are read.
    """
    device = next(component.module.parameters()).device
    batch = torch.export.Dim("batch")
    args, dynamic = [], []
    for name, value in component.inputs.items():
        args.append(value[:1].expand(TRACE_ROWS, *value.shape[1:]).contiguous().to(device))
        dynamic.append({0: batch} | {axis: torch.export.Dim(label) for axis, label in component.dynamic.get(name, {}).items()})
    exporter_log = logging.getLogger("torch.onnx._internal.exporter")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                component.module.eval(),
                tuple(args),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                dynamic_shapes=((*dynamic,),),
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    return program.model
