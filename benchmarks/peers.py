"""Weight quantizers of other projects, run through their own packages on a student's transformer.

Each function returns (network, bytes): a module that replaces the transformer when sampling, and the size of the weights of its Linears
with scales and zero points. Linears that a quantizer leaves unchanged count 2 bytes per weight (our choice: nobody would ship fp32).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.export.parity import check, reference
from flashgen.export.write import write_graph
from flashgen.models.networks import linears_of
from flashgen.models.pipeline import Pipeline

GROUP = 32


class Session(nn.Module):
    """An ONNX transformer, called like the torch one."""

    def __init__(self, path: Path, config: Any) -> None:
        super().__init__()
        self.session, self.config = onnxruntime.InferenceSession(path), config

    def forward(self, return_dict: bool = False, **inputs: Tensor) -> tuple[Tensor]:
        """Output of the graph for the transformer's keyword arguments."""
        return (torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]),)


def onnxruntime_nbits(pipe: Pipeline, sampler: Sampler, kind: str, folder: Path) -> tuple[nn.Module, float]:
    """ONNX Runtime's MatMulNBitsQuantizer, `kind` default, hqq or k_quant, 4 bits, asymmetric, on flashgen's fp32 export.

    It changes MatMul only. adaLN, whose input has two dimensions, is exported as Gemm: these weights stay unquantized.
    """
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    part = next(c for c in pipe.family.export_components(copy.deepcopy(pipe), sampler) if c.name == "transformer")
    expected = reference(part)
    pipe.family.prepare_export(part.module.net, tuple(part.inputs["hidden_states"].shape[1:]))
    check(part, expected, write_graph(part, {}, folder), 60.0)
    configs = {
        "default": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False),
        "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=GROUP, bits=4),
        "k_quant": lambda: nbits.KQuantWeightOnlyQuantConfig(),
    }
    model = onnx.load(folder / "transformer" / "model.onnx")
    quantizer = nbits.MatMulNBitsQuantizer(model, block_size=GROUP, is_symmetric=False, algo_config=configs[kind]())
    quantizer.process()
    path = folder / f"{kind}.onnx"
    quantizer.model.save_model_to_file(str(path))
    graph = onnx.load(path).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    parts = [stored[name] for node in nodes for name in node.input[1:4] if name in stored]
    packed = sum(
        part.nbytes if part.dtype == np.uint8 else 2 * part.size for part in parts
    )  # scales are fp32 in the file; fp16 would be enough
    left = sum(layer.weight.numel() for layer in linears_of(pipe.transformer).values()) - sum(_size(node) for node in nodes)
    return Session(path, pipe.transformer.config), packed + 2 * left


def _size(node: Any) -> int:
    sides = {a.name: a.i for a in node.attribute}
    return int(sides["K"] * sides["N"])


class _Plain(nn.Module):
    """A transformer that takes and returns tensors only; by position, as NNCF calls it, or by the transformer's argument names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.config = net, net.config

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        return (self.net(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False)[0],)


def nncf_int4(transformer: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, float]:
    """NNCF's compress_weights, INT4_ASYM, all layers; a layer whose inputs do not divide into groups gets smaller groups.

    `example` are the inputs of one call, by position.
    """
    import nncf

    adjust = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    net = nncf.compress_weights(
        _Plain(copy.deepcopy(transformer)), mode=nncf.CompressWeightsMode.INT4_ASYM, ratio=1.0, group_size=GROUP, all_layers=True,
        dataset=nncf.Dataset([example]), advanced_parameters=adjust,
    )  # fmt: skip
    names = {f"net.{name}.weight" for name in linears_of(transformer)}
    state = net.state_dict()
    whole = sum(2 * t.numel() for name, t in state.items() if name in names and t.is_floating_point())
    packed = sum(t.nbytes for name, t in state.items() if t.dtype == torch.uint8 or name.endswith("_scale"))
    return net, float(whole + packed)


def bitsandbytes_nf4(transformer: nn.Module) -> tuple[nn.Module, float]:
    """bitsandbytes NF4, blocks of 64 with fp32 scales: the default of diffusers' BitsAndBytesConfig."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    net, total = copy.deepcopy(transformer), 0
    for layer in linears_of(net).values():
        codes, state = quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
        layer.weight.data = dequantize_4bit(codes, state)
        total += codes.nbytes + state.absmax.nbytes
    return net, float(total)
