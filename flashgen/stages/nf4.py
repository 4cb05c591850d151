"""quantize --scheme nf4: the transformer in bitsandbytes' NF4, which diffusers loads on a GPU as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import read_json
from flashgen.errors import UsageError
from flashgen.progress import track
from flashgen.stages.base import Result, Stage

if TYPE_CHECKING:
    from torch import Tensor


def write_nf4(stage: Stage, draft: Draft, protect: Sequence[str]) -> Result:
    """Write every Linear of the transformer outside of `protect` in NF4 and the rest in fp16; all are held until the file is written.

    Raises NumericsError for a weight that fp16 cannot hold.
    """
    import torch
    from diffusers import BitsAndBytesConfig

    from flashgen.models.nf4 import pack, unpack
    from flashgen.models.rewrite import linear_shapes
    from flashgen.models.save import save_changed, to_half
    from flashgen.models.stream import read, weight_files, write
    from flashgen.quant.layer import relative_error

    pipeline = stage.source.path
    source, target = pipeline / "transformer", draft.path / "transformer"
    shapes = linear_shapes(pipeline, "transformer", stage.family)
    shapes = {name: shape for name, shape in shapes.items() if not _skipped(name, protect)}
    if not shapes:
        raise UsageError("quantize.protect leaves no layer for --scheme nf4; protect fewer")
    tensors: dict[str, Tensor] = {}
    error, packed_bytes = 0.0, 0
    files = weight_files(source)
    for path in track(files, "quantize to NF4", total=len(files)):
        for name, tensor in read(path):
            layer, _, parameter = name.rpartition(".")
            if parameter != "weight" or layer not in shapes:
                tensors[name] = to_half(tensor, f"transformer: {name}") if tensor.is_floating_point() else tensor
                continue
            packed = pack(tensor)
            error = max(error, relative_error(unpack(packed), tensor.float()))
            packed_bytes += sum(value.nbytes for value in packed.values())
            tensors |= {f"{layer}.{key}": value for key, value in packed.items()}
    target.mkdir()
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write(target / "diffusion_pytorch_model.safetensors", kinds, tensors.items())
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=list(protect)
    )
    config = read_json(source / "config.json") | {"quantization_config": settings.to_dict()}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_changed(draft, pipeline, stage.family, {}, kept=("transformer",))
    metrics: dict[str, Any] = {"weight_error_max": error, "packed_bytes": packed_bytes}
    return Result(stage.sampler, metrics | {"mean_bits": 8 * packed_bytes / sum(map(prod, shapes.values()))})


def _skipped(layer: str, protect: Sequence[str]) -> bool:
    """Return True if diffusers leaves `layer` whole with `llm_int8_skip_modules` set to `protect`."""
    return any(f"{name}." in layer or name == layer for name in protect)
