"""Writing a component as model.onnx: traced, quantized, optimized and saved with its weights read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from accelerate.hooks import remove_hook_from_module
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from flashgen.errors import FlashgenError
from flashgen.export.graph import trace
from flashgen.export.rewrite import halve_scales, halve_weights, quantize_linears, transpose_weights
from flashgen.families.graphs import Component
from flashgen.models.networks import linears_of, parameter_names
from flashgen.models.save import to_half
from flashgen.models.stream import header, tensor, tensor_files, weight_files
from flashgen.quant.pack import QuantizedLinear

EXTERNAL_BYTES = 1 << 26  # above this, weights go into model.onnx_data, which onnxruntime maps; a protobuf is parsed as a whole
HALF_BYTES = 1 << 20  # a constant of at least this size that the artifact keeps in 16 bits is stored in fp16


def write_graph(
    part: Component,
    layers: Mapping[str, QuantizedLinear],
    folder: Path,
    accuracy_level: int = 0,
    modulation: re.Pattern[str] | None = None,
    source: Path | None = None,
    half: bool = False,
) -> Path:
    """Write `part` with the codes of `layers` to folder/NAME/model.onnx; returns that path.

    Weights are read from `source`, the component's folder, one at a time as they are written; those that the module itself holds (all,
    without `source`) come from there. With `half` the graph computes in fp16, apart from noise levels, inputs and outputs.
    Afterwards the module is on `meta`. Raises ArtifactError for codes that do not fit the graph, or
    when a layer that `modulation` matches has none, and NumericsError for a weight that fp16 cannot hold.
    """
    weights = _weights(part.module, source)
    part.module.to("meta", torch.float16 if half else None)
    model = trace(part)
    for name, value in model.graph.initializers.items():
        value.const_value = _lazy_constant(value, weights[name])
    if layers:
        unused = _unused_linears(part.module.net, model)
        quantize_linears(model, {name: q for name, q in layers.items() if name not in unused}, accuracy_level, modulation)
        RemoveUnusedNodesPass()(model)
    transpose_weights(model)
    with np.errstate(all="ignore"):  # folding T5's bucket table takes the log of 0, as torch does
        onnxscript.optimizer.optimize_ir(model)
    if layers:
        halve_scales(model)
    if source is not None:
        halve_weights(model, {f"net.{name}" for name, size in _in_16_bits(source).items() if size >= HALF_BYTES})
    model.producer_name, model.graph.name = "flashgen", part.name
    _strip(model)
    path = folder / part.name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        ir.save(model, path, external_data="model.onnx_data" if size > EXTERNAL_BYTES else None)
    except Exception as error:
        cause: BaseException | None = error  # onnx_ir wraps what a constant raises when it is read
        while cause is not None and not isinstance(cause, FlashgenError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise
    return path


def _weights(module: nn.Module, source: Path | None) -> dict[str, Callable[[], Tensor]]:
    """Functions that return each tensor of `module` by name: its own, or, where it has none, the one in `source`. Removes its hooks."""
    remove_hook_from_module(module, recurse=True)
    files = tensor_files(source) if source else {}
    tensors = [*module.named_buffers(), *module.named_parameters(remove_duplicate=False)]
    readers: dict[str, Callable[[], Tensor]] = {name: partial(torch.clone, value.detach()) for name, value in tensors if not value.is_meta}
    for parameter, names in parameter_names(module):
        name_in_file = next((name for name in (n.removeprefix("net.") for n in names) if name in files), None)
        if parameter.is_meta and name_in_file is not None:
            readers |= {name: partial(tensor, files[name_in_file], name_in_file) for name in names}
    return readers


def _unused_linears(network: nn.Module, model: ir.Model) -> set[str]:
    """Linears of `network` that the component's outputs do not depend on, such as a text encoder's pooler."""
    used = {name for name, value in model.graph.initializers.items() if value.uses()}
    return {name for name in linears_of(network) if f"net.{name}.weight" not in used}


def _lazy_constant(value: ir.Value, read: Callable[[], Tensor]) -> ir.LazyTensor:
    """The constant `value` in fp32 (fp16, integers), as the graph has it, read when it is written."""
    assert value.dtype is not None and isinstance(value.shape, ir.Shape)

    def get() -> ir.TensorProtocol:
        weight = read()
        if value.dtype == ir.DataType.FLOAT16:
            weight = to_half(weight.float(), str(value.name).removeprefix("net."))
        elif weight.is_floating_point():
            weight = weight.float()
        return ir.tensor(weight.contiguous().numpy(), name=value.name)

    return ir.LazyTensor(get, dtype=value.dtype, shape=value.shape, name=value.name)


def _in_16_bits(folder: Path) -> dict[str, int]:
    """Bytes of each tensor that a network's files keep in fp16 or bf16, by name."""
    entries = {name: entry for path in weight_files(folder) for name, entry in header(path)[0].items()}
    return {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items() if e["dtype"] in ("F16", "BF16")}


def _strip(model: ir.Model) -> None:
    """Drop torch's notes: stack traces of this machine and the whole export signature (55 kB of a 2.4 MB transformer)."""
    ClearMetadataAndDocStringPass()(model)
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
