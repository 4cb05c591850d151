"""From a component to its checked model.onnx."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgen.errors import ArtifactError
from flashgen.export.attention import fuse_attention
from flashgen.export.components import Component, crop_positions, trace
from flashgen.export.parity import check
from flashgen.export.rewrite import halve_scales, quantize_linears
from flashgen.models.factored import factor
from flashgen.quant.pack import QuantizedLinear, dequantize

EXTERNAL_BYTES = 1 << 30  # protobuf ends at 2 GB; above this, weights go into model.onnx_data, which onnxruntime maps


def write_component(part: Component, layers: Mapping[str, QuantizedLinear], folder: Path, accuracy_level: int, floor_db: float) -> float:
    """Trace, quantize `layers`, optimize, save and check one component; returns its worst output's PSNR in dB.

    The transformer's position table is cropped and its attention fused in place. Raises NumericsError below `floor_db`.
    """
    reference = [value.numpy() for value in part.reference()]  # before the crop, so that parity covers it
    if part.name == "transformer":
        crop_positions(part.module.net, part.inputs["hidden_states"].shape[-1])
        fuse_attention(part.module.net)
    model = trace(part)
    if layers:
        quantize_linears(model, layers, accuracy_level)
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
    with _whole(path):
        layers = json.loads((path / "quantized" / "layers.json").read_text())
        tensors = load_file(path / "quantized" / "transformer.safetensors")
        return {name: _codes(tensors, name, spec) for name, spec in layers.items()}


def put_factors(transformer: nn.Module, codes: Mapping[str, QuantizedLinear], path: Path) -> None:
    """adaLN layers that the artifact keeps on a shared basis become their factors, with the weights of their codes. In place."""
    ups = {name.removesuffix(".up"): dequantize(q) for name, q in codes.items() if name.endswith(".up")}
    if ups:
        with _whole(path):
            basis = load_file(path / "quantized" / "transformer.safetensors")["basis"].float().T.contiguous()
            for name, up in ups.items():
                layer = transformer.get_submodule(name)
                if not isinstance(layer, nn.Linear) or (*up.shape, len(basis)) != (layer.out_features, basis.shape[1], layer.in_features):
                    raise ValueError(f"the factors of {name} do not fit it")
            factor(transformer, basis, ups)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever reading quantized/ meets ends as one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        mend = "make it again with: flashgen quantize STUDENT --out DIR"
        raise ArtifactError(f"{path}/quantized is broken ({error!r}); {mend}") from error


def _codes(tensors: Mapping[str, Tensor], name: str, spec: Mapping[str, int]) -> QuantizedLinear:
    codes, scales, bits, group = tensors[f"{name}.codes"], tensors[f"{name}.scales"].float(), int(spec["bits"]), int(spec["group"])
    zeros = None if spec["symmetric"] else tensors[f"{name}.zeros"]
    if zeros is not None and zeros.is_floating_point():
        zeros = zeros.float()
    if bits not in (2, 3, 4, 8) or group < 16 or scales.ndim != 2:
        raise ValueError(f"{name} has {bits} bits in groups of {group}")
    rows, blocks = scales.shape
    wanted, found = [[rows, blocks, group * bits // 8]], [list(codes.shape)]
    if zeros is not None:
        wanted.append([rows, blocks if zeros.is_floating_point() else -(-blocks * bits // 8)])
        found.append(list(zeros.shape))
    if found != wanted or codes.dtype != torch.uint8:
        raise ValueError(f"codes and zeros of {name} do not fit its scales")
    return QuantizedLinear(codes, scales, zeros, bits, group, blocks * group)
