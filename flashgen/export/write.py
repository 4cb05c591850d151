"""From a component to its checked model.onnx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgen.errors import ArtifactError
from flashgen.export.components import Component, crop_positions, trace
from flashgen.export.parity import check
from flashgen.export.rewrite import halve_scales, to_matmul_nbits
from flashgen.models.factored import factor
from flashgen.quant.pack import QuantizedLinear, dequantize

EXTERNAL_BYTES = 1 << 30  # protobuf ends at 2 GB; above this, weights go into model.onnx_data, which onnxruntime maps


def write_component(part: Component, layers: Mapping[str, QuantizedLinear], folder: Path, accuracy_level: int, floor_db: float) -> float:
    """Trace, quantize `layers`, optimize, save and check one component; returns its worst output's PSNR in dB.

    The transformer's position table is cropped in place. Raises NumericsError below `floor_db`.
    """
    reference = [value.numpy() for value in part.reference()]  # before the crop, so that parity covers it
    if part.name == "transformer":
        crop_positions(part.module.net, part.inputs["hidden_states"].shape[-1])
    model = trace(part)
    if layers:
        to_matmul_nbits(model, layers, accuracy_level)
        RemoveUnusedNodesPass()(model)
    with np.errstate(all="ignore"):  # folding T5's bucket table takes the log of 0, as torch does
        onnxscript.optimizer.optimize_ir(model)
    if layers:
        halve_scales(model)
    model.producer_name, model.graph.name = "flashgen", part.name
    _strip(model)
    path = folder / part.name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data="model.onnx_data" if size > EXTERNAL_BYTES else None)
    del model
    return check(part, reference, path, floor_db)


def _strip(model: ir.Model) -> None:
    """Drop what torch notes on its way: stack traces of this machine, the whole export signature (55 kB of a 2.4 MB transformer)."""
    ClearMetadataAndDocStringPass()(model)
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


def read_codes(path: Path) -> dict[str, QuantizedLinear]:
    """Codes of every layer of a quantized artifact, in the order of quantized/layers.json."""
    try:
        layers = json.loads((path / "quantized" / "layers.json").read_text())
        tensors = load_file(path / "quantized" / "transformer.safetensors")
        return {name: _codes(tensors, name, spec) for name, spec in layers.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from error


def put_factors(transformer: nn.Module, codes: Mapping[str, QuantizedLinear], path: Path) -> None:
    """adaLN layers that the artifact keeps on a shared basis become their factors, with the weights of their codes. In place."""
    ups = {name.removesuffix(".up"): dequantize(q) for name, q in codes.items() if name.endswith(".up")}
    if ups:
        try:
            factor(transformer, load_file(path / "quantized" / "transformer.safetensors")["basis"].float(), ups)
        except (KeyError, AttributeError) as error:
            raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}/quantized is broken ({error!r}); make it again with: flashgen quantize STUDENT --out DIR")


def _codes(tensors: Mapping[str, Tensor], name: str, spec: Mapping[str, int]) -> QuantizedLinear:
    codes, scales, group = tensors[f"{name}.codes"], tensors[f"{name}.scales"].float(), int(spec["group"])
    zeros = None if spec["symmetric"] else tensors[f"{name}.zeros"]
    if zeros is not None and zeros.is_floating_point():
        zeros = zeros.float()
    return QuantizedLinear(codes, scales, zeros, int(spec["bits"]), group, scales.shape[1] * group)
