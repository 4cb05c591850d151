"""flashgen quantize: group-wise INT4 for every linear layer of the transformer, a few protected ones at 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

from flashgen.artifact.store import Artifact, begin, open_artifact
from flashgen.recipe.schema import Recipe


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    """Data-free: no calibration, linear in the weights. The folder stays loadable by diffusers (dequantized weights);
    the codes that `export` writes are in quantized/."""
    config = recipe.quantize
    parent = open_artifact(student, ("student",))
    draft = begin(
        out, kind="quantized", stage="quantize", recipe=config.model_dump(), seed=seed, parents=[parent.as_parent("student")], force=force
    )
    if isinstance(draft, Artifact):
        return draft
    from safetensors.torch import save_file
    from torch import Tensor, nn

    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.progress import track
    from flashgen.quant.pack import dequantize
    from flashgen.quant.rounding import quantize_groups
    from flashgen.stages.report import finish

    transformer = load_pipeline(parent.path).transformer
    linears = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    error: dict[str, float] = {}
    for name, linear in track(linears, "quantize", total=len(linears)):
        bits = 8 if name.startswith(tuple(config.protect)) else config.bits
        q = quantize_groups(linear.weight, bits, config.group, config.symmetric)
        tensors |= {f"{name}.codes": q.codes, f"{name}.scales": q.scales} | ({} if q.zeros is None else {f"{name}.zeros": q.zeros})
        layers[name] = {"bits": bits, "group": config.group, "symmetric": config.symmetric}
        weight = dequantize(q)
        error[name] = float((weight - linear.weight).norm() / linear.weight.norm().clamp_min(1e-12))
        linear.weight.data.copy_(weight)
    (draft.path / "quantized").mkdir()
    save_file(tensors, draft.path / "quantized" / "transformer.safetensors")
    (draft.path / "quantized" / "layers.json").write_text(json.dumps(layers, indent=1) + "\n")
    save_changed(draft, parent.path, {"transformer": transformer})
    count = sum(linear.weight.numel() for _, linear in linears)
    packed = sum(t.numel() * t.element_size() for t in tensors.values())
    metrics = {"mean_bits": 8 * packed / count, "packed_bytes": packed, "weight_error_max": max(error.values())}
    return finish(draft, parent.manifest.sampler, recipe.bench, metrics=metrics)  # type: ignore[arg-type]
