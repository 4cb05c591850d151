"""quantize --scheme nf4: the transformer in bitsandbytes' NF4, which diffusers loads on a GPU as it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flashgen.artifact.store import Artifact, Draft
from flashgen.errors import UsageError
from flashgen.progress import track
from flashgen.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.artifact.manifest import Sampler


def run(parent: Artifact, sampler: Sampler, recipe: Recipe, draft: Draft) -> Artifact:
    """Every Linear but those of `quantize.protect`, which stay in fp16 like the rest. They are held until all are written."""
    import torch
    from diffusers import BitsAndBytesConfig

    from flashgen.models.nf4 import pack, unpack
    from flashgen.models.save import save_changed
    from flashgen.models.stream import read, weight_files, write
    from flashgen.stages.quantize import relative_error, shapes_of
    from flashgen.stages.report import finish

    source, protect = parent.path / "transformer", recipe.quantize.protect
    whole = {name: shape for name, shape in shapes_of(parent.path).items() if not _skipped(name, protect)}
    if not whole:
        raise UsageError("quantize.protect leaves no layer for --scheme nf4; protect fewer")
    tensors: dict[str, Tensor] = {}
    error, packed = 0.0, 0
    files = weight_files(source)
    for path in track(files, "quantize to NF4", total=len(files)):
        for name, tensor in read(path):
            layer, _, part = name.rpartition(".")
            if part != "weight" or layer not in whole:
                tensors[name] = tensor.half() if tensor.is_floating_point() else tensor
                continue
            made = pack(tensor)
            error, packed = max(error, relative_error(unpack(made), tensor.float())), packed + sum(t.nbytes for t in made.values())
            tensors |= {f"{layer}.{key}": value for key, value in made.items()}
    (draft.path / "transformer").mkdir()
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write(draft.path / "transformer" / "diffusion_pytorch_model.safetensors", shapes, tensors.items())
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=protect
    )
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": how.to_dict()}
    (draft.path / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_changed(draft, parent.path, {}, kept=("transformer",))
    metrics: dict[str, object] = {"weight_error_max": error, "packed_bytes": packed}
    metrics["mean_bits"] = 8 * packed / sum(n * k for n, k in whole.values())
    return finish(draft, sampler, recipe.bench, metrics=metrics)


def _skipped(layer: str, protect: list[str]) -> bool:
    """As diffusers decides it for `llm_int8_skip_modules`."""
    return any(f"{name}." in layer or name == layer for name in protect)
