"""Quantized layers as nodes of an ONNX graph, written from the artifact's own codes.

MatMulNBits for groups. Where one scale per output was asked for: DynamicQuantizeMatMul, or, for inputs with a fixed scale, the standard
QuantizeLinear and DequantizeLinear around a MatMul, from which onnxruntime and OpenVINO make products of integers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from flashgen.errors import ArtifactError
from flashgen.models.save import to_half
from flashgen.quant.pack import InputScale, QuantizedLinear, as_bits

DOMAIN = "com.microsoft"
Rounded = dict[tuple[ir.Value, InputScale], ir.Value]  # a value as integer products read it, by the value and its scale


class Linear(NamedTuple):
    """A Linear in the graph: its input, its output, its bias, its inputs and outputs per row, the nodes that compute it."""

    x: ir.Value
    out: ir.Value
    bias: ir.Value | None
    k: int
    n: int
    nodes: tuple[ir.Node, ...]


def linears(graph: ir.Graph) -> dict[str, Linear]:
    """Every Linear by parameter name without `.weight`, whether it was exported as Gemm or as Transpose, MatMul (and Add)."""
    matches = {}
    for name, weight in graph.initializers.items():
        linear = _linear(weight)
        if linear is not None and name.endswith(".weight"):
            matches[name.removesuffix(".weight")] = linear
    return matches


def _linear(weight: ir.Value) -> Linear | None:
    if weight.shape is None or len(weight.shape) != 2:
        return None
    n, k = int(weight.shape[0]), int(weight.shape[1])  # type: ignore[arg-type]
    node = _only_user(weight)
    if node is None:
        return None
    if node.op_type == "Gemm":
        plain = node.attributes.get_int("transB", 0) == 1 and node.attributes.get_int("transA", 0) == 0
        scaled = node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1
        if not plain or scaled or node.inputs[0] is None:
            return None
        return Linear(node.inputs[0], node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None, k, n, (node,))
    matmul = _only_user(node.outputs[0]) if node.op_type == "Transpose" else None
    if matmul is None or matmul.op_type != "MatMul" or matmul.inputs[1] is not node.outputs[0] or matmul.inputs[0] is None:
        return None
    add = _only_user(matmul.outputs[0])
    if add is not None and add.op_type == "Add":
        bias = next((v for v in add.inputs if v is not matmul.outputs[0]), None)
        if bias is not None and bias.is_initializer() and bias.shape is not None and list(bias.shape) == [n]:
            return Linear(matmul.inputs[0], add.outputs[0], bias, k, n, (add, matmul, node))
    return Linear(matmul.inputs[0], matmul.outputs[0], None, k, n, (matmul, node))


def _only_user(value: ir.Value) -> ir.Node | None:
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def quantize_linears(
    model: ir.Model, layers: Mapping[str, QuantizedLinear], accuracy_level: int, modulation: re.Pattern[str] | None = None
) -> None:
    """Replace every layer of `layers` by nodes with its codes, in place; MatMulNBits takes 3-bit codes in 4 bits.

    Raises ArtifactError when a layer is not in the graph with the same shape, or when a Linear whose name matches `modulation` (adaLN)
    has no codes.
    """
    graph = model.graph
    in_graph = {name.removeprefix("net."): linear for name, linear in linears(graph).items()}
    missing = [name for name, q in layers.items() if name not in in_graph or not _fits(in_graph[name], q)]
    whole = [name for name in in_graph if modulation is not None and modulation.search(name) and name not in layers]
    if missing or whole:
        what = f"quantized layers that the exported graph does not have: {missing}" if missing else f"adaLN layers left in fp32: {whole}"
        raise ArtifactError(f"{what}; make the student's codes again with: flashgen quantize STUDENT --out DIR")
    model.opset_imports[DOMAIN] = 1
    rounded: Rounded = {}
    for name, q in layers.items():
        linear = in_graph[name]
        if q.inputs is not None:
            nodes = _static_nodes(graph, name, linear, q, q.inputs, rounded)
        elif q.channel:
            nodes = [_integer_node(graph, name, linear, q)]
        else:
            nodes = [_nbits_node(graph, name, linear, as_bits(q, 4) if q.bits == 3 else q, accuracy_level)]
        _replace(graph, linear, nodes)


def halve_scales(model: ir.Model) -> None:
    """Store scales, fractional zero points and a shared basis in fp16, which holds them exactly (`quant.pack`)."""
    graph = model.graph
    scales = {value.name for node in graph if node.op_type == "MatMulNBits" for value in node.inputs[2:4] if value is not None}
    halve_weights(model, [name for name in graph.initializers if name in scales or name.endswith(".basis")])


def transpose_weights(model: ir.Model) -> None:
    """Store weights that only a Transpose reads in transposed form, under their own name, transposed when they are written.

    onnxscript's optimizer would transpose all of them at once, in memory.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        node, constant = _only_user(value), value.const_value
        if node is None or node.op_type != "Transpose" or constant is None or len(constant.shape) != 2:
            continue
        del graph.initializers[name]
        transposed = ir.Value(name=name, const_value=_transposed(constant, name))
        graph.register_initializer(transposed)
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
        graph.remove(node, safe=True)


def _transposed(constant: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    shape = ir.Shape(list(constant.shape.numpy())[::-1])
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(constant.numpy().T), name=name), dtype=constant.dtype, shape=shape, name=name
    )


def halve_weights(model: ir.Model, names: Collection[str]) -> None:
    """Store constants in fp16 behind a Cast, which onnxruntime folds when it loads; rows of an embedding table are cast behind its Gather.

    fp16 sources lose nothing, bf16 sources numbers below 6e-8. To be called after every pass that folds constants; a constant that fp16
    cannot hold raises NumericsError when the graph is saved.
    """
    graph = model.graph
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers[name]
        constant, users = value.const_value, [use.node for use in value.uses()]
        if constant is None or constant.dtype != ir.DataType.FLOAT or not users:
            continue
        del graph.initializers[name]
        half = ir.Value(name=name, const_value=_halved(constant, name))
        graph.register_initializer(half)
        table = users[0].op_type == "Gather" and len(users) == 1 and users[0].inputs[0] is value
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].name = f"{name}.fp32"
        if table:
            rows = users[0].outputs[0]
            cast.outputs[0].shape, cast.outputs[0].type = rows.shape, rows.type
            rows.type = ir.TensorType(ir.DataType.FLOAT16)
            graph.insert_after(users[0], cast)
            ir.convenience.replace_all_uses_with(rows, cast.outputs[0], replace_graph_outputs=True)
            users[0].replace_input_with(0, half)
            cast.replace_input_with(0, rows)
        else:
            graph.insert_before(next(node for node in graph if node in users), cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])


def _halved(constant: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    def get() -> ir.TensorProtocol:
        weight = torch.from_numpy(np.require(constant.numpy(), requirements="W"))
        return ir.tensor(to_half(weight, name.removeprefix("net.")).numpy(), name=name)

    return ir.LazyTensor(get, dtype=ir.DataType.FLOAT16, shape=ir.Shape(list(constant.shape.numpy())), name=name)


def _fits(linear: Linear, q: QuantizedLinear) -> bool:
    groups = -(-linear.k // q.group)
    codes, scales = (linear.n, groups, q.group * q.bits // 8), (linear.n, groups)
    return q.k == linear.k and tuple(q.codes.shape) == codes and tuple(q.scales.shape) == scales


def _replace(graph: ir.Graph, linear: Linear, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes`, whose last one has the layer's output, in place of `linear`."""
    result = nodes[-1].outputs[0]
    result.shape, result.type, result.name = linear.out.shape, linear.out.type, linear.out.name  # it may be the graph's output
    graph.insert_before(linear.nodes[0], nodes)
    ir.convenience.replace_all_uses_with(linear.out, result, replace_graph_outputs=True)
    weight = linear.nodes[-1].inputs[1 if len(linear.nodes) == 1 else 0]
    graph.remove(linear.nodes, safe=True)
    assert weight is not None and weight.name is not None
    del graph.initializers[weight.name]


def _nbits_node(graph: ir.Graph, name: str, linear: Linear, q: QuantizedLinear, accuracy_level: int) -> ir.Node:
    half = linear.out.dtype == ir.DataType.FLOAT16  # scales and fractional zero points have the type of the product, and fit (`quant.pack`)
    parts = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros}
    typed = {part: value.half() if half and value is not None and value.is_floating_point() else value for part, value in parts.items()}
    inputs: list[ir.Value | None] = [linear.x]
    inputs += [None if value is None else _constant(graph, f"{name}.{part}", value.numpy()) for part, value in typed.items()]
    inputs += [None, linear.bias] if linear.bias is not None else []  # input 4 is g_idx, unused
    attributes = {"K": linear.k, "N": linear.n, "bits": q.bits, "block_size": q.group, "accuracy_level": accuracy_level}
    return ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=name)


def _integer_node(graph: ir.Graph, name: str, linear: Linear, q: QuantizedLinear) -> ir.Node:
    """Activations get one scale and zero point per call."""
    inputs: list[ir.Value | None] = [linear.x, *_signed(graph, name, q)]
    inputs += [None, linear.bias] if linear.bias is not None else []  # input 3 are the weights' zero points, all 0
    return ir.node("DynamicQuantizeMatMul", inputs, domain=DOMAIN, name=name)


def _static_nodes(graph: ir.Graph, name: str, linear: Linear, q: QuantizedLinear, scale: InputScale, rounded: Rounded) -> list[ir.Node]:
    """Activations have a fixed scale and zero point; layers that read the same value with the same scale share its nodes in `rounded`."""
    if (linear.x, scale) not in rounded:
        parameters = [
            _constant(graph, f"{name}.input_scale", np.array(scale.scale, np.float32)),
            _constant(graph, f"{name}.input_zero", np.array(scale.zero, np.uint8)),
        ]
        codes = ir.node("QuantizeLinear", [linear.x, *parameters])
        values = ir.node("DequantizeLinear", [*codes.outputs, *parameters])
        producer = linear.x.producer()
        if producer is None:
            graph.insert_before(graph[0], [codes, values])
        else:
            graph.insert_after(producer, [codes, values])
        rounded[linear.x, scale] = values.outputs[0]
    weight = ir.node("DequantizeLinear", _signed(graph, name, q), {"axis": 1})
    product = ir.node("MatMul", [rounded[linear.x, scale], *weight.outputs], name=name)
    bias = [] if linear.bias is None else [ir.node("Add", [*product.outputs, linear.bias])]
    return [weight, product, *bias]


def _signed(graph: ir.Graph, name: str, q: QuantizedLinear) -> list[ir.Value]:
    """int8 weights [K, N] and scales [N]. Unsigned weights take twice as long (docs/device-vnni.md)."""
    codes = np.ascontiguousarray((q.codes[:, 0].numpy().astype(np.int16) - 128).astype(np.int8).T)
    return [_constant(graph, f"{name}.{part}", array) for part, array in {"codes": codes, "scales": q.scales[:, 0].numpy()}.items()]


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
