"""The transformer as one GGUF file in the names of its family's original checkpoints, written and read back one tensor at a time.

The codes of a quantized artifact go into the GGUF type that holds them, in blocks of 32 with an fp16 d:

    Q4_0   d (q - 8)   2 and 3 bits with whole zero points, 4 bits without: exact
    Q4_1   d q + m     4 bits with zero points: the same codes and scales, m = -d * zero rounded to fp16
    Q8_0   d q         8 bits without zero points: exact

Nothing is quantized again: layers that no type holds (groups of 16, 8 bits with zero points, layers on a shared basis) keep the artifact's
fp16 weights, and so do convolutions and the position table. Vectors are fp32, as is usual in GGUF.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from flashgen.artifact.manifest import Sampler
from flashgen.errors import NumericsError
from flashgen.export.parity import EQUAL_DB, psnr_db
from flashgen.families.base import Family, OriginalTensor
from flashgen.models.save import to_half
from flashgen.models.stream import Stored
from flashgen.quant.pack import QuantizedLinear, unpack, zeros_of

BLOCK = 32
PLAIN = {Type.F16: np.float16, Type.F32: np.float32}


def write(
    path: Path, family: Family, weights: Mapping[str, Stored], codes: Mapping[str, QuantizedLinear], sampler: Sampler, digest: str
) -> Counter[str]:
    """Write `weights` (by diffusers' names) to `path`; returns the number of tensors of each GGUF type.

    Keys flashgen.* say how to draw. Raises NumericsError for a weight that fp16 cannot hold.
    """
    tensors = family.original_tensors(list(weights))
    types = {tensor.name: type_of(tensor, weights, codes) for tensor in tensors}
    count = Counter(kind.name for kind in types.values())
    most = max((kind for kind in count if kind != "F32"), key=lambda kind: count[kind])
    assert family.gguf_arch is not None  # original_tensors refuses a family without one
    writer = gguf.GGUFWriter(None, arch=family.gguf_arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_string("flashgen.digest", digest)
    writer.add_array("flashgen.sigmas", sampler.sigmas)
    writer.add_float32("flashgen.guidance", sampler.guidance)
    writer.add_string("flashgen.encoder", sampler.encoder)
    for tensor in tensors:
        kind, shape = types[tensor.name], _shape(tensor, weights)
        stored = shape if kind in PLAIN else gguf.quant_shape_to_byte_shape(shape, kind)
        dtype = np.dtype(PLAIN.get(kind, np.uint8))
        writer.add_tensor_info(tensor.name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_encode(tensor, types[tensor.name], weights, codes))
    writer.close()
    return count


def check(path: Path, family: Family, weights: Mapping[str, Stored], floor_db: float) -> float:
    """Read `path` back: plain tensors must be equal to `weights`; returns the worst PSNR of the others, 200 dB when all are equal.

    Raises NumericsError when a tensor is missing, differs or is below `floor_db`.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = EQUAL_DB
    for tensor in family.original_tensors(list(weights)):
        entry = stored.pop(tensor.name, None)
        if entry is None:
            raise NumericsError(f"{path} has no tensor {tensor.name}; export again")
        value = entry.data if entry.tensor_type in PLAIN else gguf.dequantize(entry.data, entry.tensor_type)
        rows = _swap(value.reshape(_shape(tensor, weights)), tensor)
        parts = np.split(rows, np.cumsum([weights[name].shape[0] for name in tensor.parts])[:-1])
        for name, part in zip(tensor.parts, parts, strict=True):
            expected = weights[name]().to(torch.float16 if entry.tensor_type == Type.F16 else torch.float32).numpy()
            db = EQUAL_DB if np.array_equal(part, expected) else psnr_db(expected, part)
            if not db >= (EQUAL_DB if entry.tensor_type in PLAIN else floor_db):
                raise NumericsError(
                    f"{tensor.name}: {name} is at {db:.1f} dB PSNR in the GGUF, the floor is {floor_db:g} dB; nothing was written. "
                    "Accept it with --set export.psnr_floor_db=..., or report it as a bug."
                )
            worst = min(worst, db)
    assert not stored, stored
    return worst


def type_of(tensor: OriginalTensor, weights: Mapping[str, Stored], codes: Mapping[str, QuantizedLinear]) -> Type:
    """The GGUF type that holds the codes of all parts of `tensor`, or F16; F32 for vectors."""
    if len(_shape(tensor, weights)) == 1:
        return Type.F32
    types = {_type(codes.get(name.removesuffix(".weight"))) for name in tensor.parts}
    return types.pop() if len(types) == 1 else Type.F16


def _type(q: QuantizedLinear | None) -> Type:
    """The GGUF type that holds the codes of one layer, or F16."""
    if q is None or q.group % BLOCK or q.k % BLOCK or (q.bits == 8 and q.zeros is not None):
        return Type.F16
    if q.bits == 8:
        return Type.Q8_0
    fits = q.zeros is None or (q.bits < 4 and not q.zeros.is_floating_point())
    return Type.Q4_0 if fits else Type.Q4_1


def _shape(tensor: OriginalTensor, weights: Mapping[str, Stored]) -> tuple[int, ...]:
    shapes = [weights[name].shape for name in tensor.parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _encode(tensor: OriginalTensor, kind: Type, weights: Mapping[str, Stored], codes: Mapping[str, QuantizedLinear]) -> NDArray[np.generic]:
    if kind not in PLAIN:
        return _swap(np.concatenate([blocks(codes[name.removesuffix(".weight")], kind) for name in tensor.parts]), tensor)
    parts = [to_half(weights[name](), name) if kind == Type.F16 else weights[name]().float() for name in tensor.parts]
    return _swap(torch.cat(parts).numpy(), tensor)


def _swap(rows: NDArray[np.generic], tensor: OriginalTensor) -> NDArray[np.generic]:
    """Exchange the halves of `rows` where the original checkpoint has them in the other order; its own inverse."""
    return np.roll(rows, len(rows) // 2, 0) if tensor.swapped else rows


def blocks(q: QuantizedLinear, kind: Type) -> NDArray[np.uint8]:
    """The codes of `q` as GGUF blocks, bytes [N, K / 32 * size of a block]; with 4 bits, code i shares a byte with code i + 16."""

    def per_block(groups: Tensor) -> Tensor:  # [N, G] to [N, K / 32]
        return groups.repeat_interleave(q.group // BLOCK, 1)[:, : q.k // BLOCK]

    values = unpack(q.codes, q.bits, q.group).flatten(1)[:, : q.k].reshape(len(q.codes), -1, BLOCK)
    d, zeros = per_block(q.scales), per_block(zeros_of(q))
    head: Iterable[Tensor] = (d, -d * zeros) if kind == Type.Q4_1 else (d,)
    if kind != Type.Q4_1:
        values = values.float() - zeros[..., None] + (8 if kind == Type.Q4_0 else 0)
    if kind == Type.Q8_0:
        body = values.to(torch.int8).view(torch.uint8)
    else:
        nibbles = values.to(torch.uint8)
        body = nibbles[..., :16] | nibbles[..., 16:] << 4
    parts = [value.half()[..., None].view(torch.uint8) for value in head]
    packed: NDArray[np.uint8] = torch.cat([*parts, body], -1).flatten(1).numpy()
    return packed
