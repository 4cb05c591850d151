"""4-bit codes as 8-bit ones in OpenVINO's memory: the same numbers, repacked six times as fast.

OpenVINO repacks weights in the first step of every process, even if the network was compiled before: 4-bit codes at 7.5 ns of processor
time per weight, 8-bit codes at 1.3 ns, while both take the same time per step (docs/lab-log.md, 2026-11-30).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.store import Artifact
from flashgen.runtime.memory import total_bytes

ROOM = 8  # bytes of memory per byte of a transformer's file: wide codes take 4, mapped and repacked


def transformer_bytes(artifact: Artifact) -> int:
    """Bytes of an exported transformer's graph and weights."""
    return sum(file.size for file in artifact.manifest.files if file.path.startswith("transformer/model.onnx"))


def is_roomy(artifact: Artifact) -> bool:
    """Return True if this machine has the memory for wide codes of the artifact's transformer."""
    return ROOM * transformer_bytes(artifact) <= (total_bytes() or 0)


def extension() -> Any:
    """OpenVINO's extension that reads MatMulNBits with 8-bit codes."""
    from openvino.frontend.onnx import ConversionExtension

    return ConversionExtension("MatMulNBits", "com.microsoft", _convert)


def widened(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [..., count * 8 / bits] of one byte each of bytes [..., count] that hold 8 / bits codes each, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: NDArray[np.uint8] = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _convert(node: Any) -> Any:
    """x W^T + bias with W = (codes - zero points) * scales, the inputs of MatMulNBits being x, codes, scales, zero points, -, bias."""
    from openvino import opset13 as op

    k, n, group, bits = (int(node.get_attribute(name)) for name in ("K", "N", "block_size", "bits"))
    given: list[Any] = [node.get_input(index) if index != 4 else None for index in range(node.get_input_size())]
    groups = -(-k // group)
    codes = widened(given[1].get_node().data.reshape(n, groups, -1), bits)
    zeros = given[3] if len(given) > 3 else None
    if zeros is None or zeros.get_node().get_type_name() == "NullNode":
        zero: Any = op.constant(np.full((1, 1, 1), 2.0 ** (bits - 1), np.float32))
    elif zeros.get_element_type().is_real():
        zero = op.reshape(zeros, op.constant([n, groups, 1]), False)
    else:
        zero = op.convert(op.constant(widened(zeros.get_node().data.reshape(n, -1), bits)[:, :groups].reshape(n, groups, 1)), "f32")
    scales = op.reshape(given[2], op.constant([n, groups, 1]), False)
    weight = op.multiply(op.subtract(op.convert(op.constant(codes), "f32"), zero), scales)
    weight = op.reshape(weight, op.constant([n, groups * group]), False)
    if groups * group != k:
        weight = op.slice(weight, [0], [k], [1], [1])
    out = op.matmul(given[0], weight, False, True)
    return (op.add(out, given[5]) if len(given) > 5 else out).outputs()
