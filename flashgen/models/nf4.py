"""NF4 as bitsandbytes writes it and diffusers reads it (QLoRA, 2305.14314): sixteen levels, one fp32 scale per 64 weights.

Beside `weight`, uint8 [K N / 2, 1] with the first of two codes in the high bits, a layer has `weight.absmax`, `weight.quant_map` and
`weight.quant_state.bitsandbytes__nf4`, the bytes of a JSON text with blocksize and shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from flashgen.errors import ArtifactError

BLOCK = 64
STATE = "quant_state.bitsandbytes__nf4"


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The NF4 tensors of a layer's `weight` [N, K], by the part of their names behind the layer's name. Needs bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
    return {"weight": codes, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}


def unpack(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight [N, K] in fp32 of the tensors that `pack` returns, without bitsandbytes.

    Raises ArtifactError for tensors that are no NF4 layer, and for double quantization.
    """
    try:
        codes, levels, scales = (stored[name] for name in ("weight", "weight.quant_map", "weight.absmax"))
        if codes.dtype != torch.uint8 or not scales.is_floating_point() or "weight.nested_absmax" in stored:
            raise ValueError("double quantization is not read")
        state = json.loads(bytes(stored[f"weight.{STATE}"].tolist()))
        shape, block = torch.Size(state["shape"]), int(state["blocksize"])
        values = levels.float()[torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()][: shape.numel()]
        return (values * scales.float().repeat_interleave(block)[: shape.numel()]).reshape(shape)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError, AttributeError) as error:
        raise ArtifactError(f"these are no plain NF4 codes of bitsandbytes ({error!r}); give the pipeline in fp16 or bf16") from error
