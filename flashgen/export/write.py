"""From a component to its checked model.onnx."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from accelerate.hooks import remove_hook_from_module
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgen.errors import ArtifactError
from flashgen.export.attention import fuse_attention
from flashgen.export.components import Component, crop_positions, trace
from flashgen.export.parity import check, largest_output
from flashgen.export.rewrite import halve_scales, halve_weights, quantize_linears, turn_weights
from flashgen.models.factored import factor
from flashgen.models.networks import parameter_names
from flashgen.models.stream import header, tensor, tensor_files, weight_files
from flashgen.quant.pack import QuantizedLinear, dequantize

EXTERNAL_BYTES = 1 << 26  # above this, weights go into model.onnx_data, which onnxruntime maps; a protobuf is parsed whole
HALF_BYTES = 1 << 20  # of a constant that the artifact keeps in 16 bits, above which the graph does too


def write_component(
    part: Component, layers: Mapping[str, QuantizedLinear], folder: Path, accuracy_level: int, floor_db: float, source: Path | None = None
) -> tuple[float, tuple[str, float]]:
    """Trace, quantize `layers`, optimize, save and check one component; returns its worst output's PSNR in dB, and the layer that puts
    out the greatest number in torch, with that number.

    Weights are read from `source`, the component's folder, one at a time as they are written; those that the module itself has (all,
    without `source`) come from there. Afterwards it is on `meta`, its position table cropped, its attention
    fused. Raises NumericsError below `floor_db`.
    """
    with largest_output(part.module.net) as outputs:
        reference = [value.numpy() for value in part.reference()]  # before the crop, so that parity covers it
    if part.name == "transformer":
        crop_positions(part.module.net, part.inputs["hidden_states"].shape[-1])
        fuse_attention(part.module.net)
    values = _weights(part.module, source)
    part.module.to("meta")
    model = trace(part)
    for name, value in model.graph.initializers.items():
        value.const_value = _stored(value, values[name])
    if layers:
        quantize_linears(model, layers, accuracy_level)
        RemoveUnusedNodesPass()(model)
    turn_weights(model)
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
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data="model.onnx_data" if size > EXTERNAL_BYTES else None)
    del model
    return check(part, reference, path, floor_db), max(outputs.items(), key=lambda item: item[1])


def _weights(module: nn.Module, source: Path | None) -> dict[str, Callable[[], Tensor]]:
    """How to get each tensor of `module`, by name: its own, or, where it has none, that of the files in `source`. Hooks are taken off."""
    remove_hook_from_module(module, recurse=True)
    files = tensor_files(source) if source else {}
    own = [*module.named_buffers(), *module.named_parameters(remove_duplicate=False)]
    found: dict[str, Callable[[], Tensor]] = {name: partial(torch.clone, value.detach()) for name, value in own if not value.is_meta}
    for parameter, names in parameter_names(module):
        stored = next((name for name in (n.removeprefix("net.") for n in names) if name in files), None)
        if parameter.is_meta and stored is not None:
            found |= {name: partial(tensor, files[stored], stored) for name in names}
    return found


def _stored(value: ir.Value, read: Callable[[], Tensor]) -> ir.LazyTensor:
    """A constant as fp32 (or the integers that it holds), read when it is written."""
    assert value.dtype is not None and isinstance(value.shape, ir.Shape)

    def get() -> ir.TensorProtocol:
        found = read()
        return ir.tensor((found.float() if found.is_floating_point() else found).contiguous().numpy(), name=value.name)

    return ir.LazyTensor(get, dtype=value.dtype, shape=value.shape, name=value.name)


def _in_16_bits(folder: Path) -> dict[str, int]:
    """Bytes of the tensors that a network's files keep in fp16 or bf16, by name."""
    entries = {name: entry for path in weight_files(folder) for name, entry in header(path)[0].items()}
    return {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items() if e["dtype"] in ("F16", "BF16")}


def _strip(model: ir.Model) -> None:
    """Drop what torch notes on its way: stack traces of this machine, the whole export signature (55 kB of a 2.4 MB transformer)."""
    ClearMetadataAndDocStringPass()(model)
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


def read_codes(path: Path, part: str = "transformer") -> dict[str, QuantizedLinear]:
    """Codes of every layer of a quantized artifact, in the order of quantized/layers.json (of a text encoder: <its name>.json, if any)."""
    file = path / "quantized" / ("layers.json" if part == "transformer" else f"{part}.json")
    if part != "transformer" and not file.exists():
        return {}
    with _whole(path):
        layers = json.loads(file.read_text())
        tensors = load_file(path / "quantized" / f"{part}.safetensors")
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
            files = tensor_files(path / "transformer")  # the network's own may be on disk
            biases = {name: tensor(files[f"{name}.bias"], f"{name}.bias").float() for name in ups}
            factor(transformer, basis, ups, biases)


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
