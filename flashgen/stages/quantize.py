"""flashgen quantize: group-wise INT4 and its neighbours for every linear layer of the transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.store import Artifact, Draft, begin, open_artifact
from flashgen.errors import ArtifactError
from flashgen.models.specs import ENCODERS
from flashgen.progress import track
from flashgen.recipe.schema import QuantizeRecipe, Recipe
from flashgen.stages import nf4
from flashgen.stages.calibrate import Found, calibrate
from flashgen.stages.checks import check_quantizing
from flashgen.stages.plan import check
from flashgen.stages.prompts import prompts_key

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.quant.pack import QuantizedLinear


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    """Round to nearest and HQQ need no data: weights go from file to file, one in memory at a time. GPTQ, a budget and a shared
    adaLN basis load the student and run it on its own prompts.

    The folder stays loadable by diffusers (dequantized weights); the codes that `export` writes are in quantized/. Scheme nf4 keeps
    bitsandbytes' codes instead, which diffusers loads as they are.
    """
    config = recipe.quantize
    parent = open_artifact(student, ("student", "teacher"))
    sampler = parent.manifest.sampler
    assert sampler is not None
    check_quantizing(parent, recipe)
    draft = begin(
        out, kind="quantized", stage="quantize", recipe=config.model_dump() | (prompts_key(recipe) if config.calibrated else {}), seed=seed,
        parents=[parent.as_parent("student")], force=force, check=lambda work: check("quantize", parent, recipe, work),
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    if config.scheme == "nf4":
        return nf4.run(parent, sampler, recipe, draft)
    from flashgen.models.save import save_changed
    from flashgen.quant.layer import quantize_layer
    from flashgen.quant.pack import dequantize
    from flashgen.stages.report import finish

    (draft.path / "quantized").mkdir()
    found = calibrate(parent, sampler, recipe, seed, draft) if config.calibrated else Found()
    codes, whole, error = dict(found.codes), shapes_of(parent.path), dict[str, float]()

    def changed(name: str, weight: Tensor) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer in found.factored and part == "bias":
            return found.factored[layer].up.bias
        if layer not in whole or part != "weight":
            return weight
        weight = weight.float()
        if layer in found.factored:
            made = dequantize(codes[f"{layer}.up"]) @ found.factored[layer].basis.T
        else:
            if layer not in codes:
                codes[layer] = quantize_layer(weight, config.bits_of(layer), config, None)
            made = dequantize(codes[layer])
        error[layer] = relative_error(made, weight)
        return made

    _rewrite(parent.path / "transformer", draft, changed, len(whole))
    if missing := sorted(whole.keys() - error.keys()):
        raise ArtifactError(
            f"{parent.path}/transformer has no weights of {', '.join(missing[:3])}; take the artifact from its source again"
        )
    names = [f"{name}.up" if name in found.factored else name for name in whole]
    shared = next(iter(found.factored.values()), None)
    basis = {} if shared is None else {"basis": shared.basis.T.half().contiguous()}
    packed = _write_codes(draft, "transformer", "layers.json", {name: codes[name] for name in names}, basis)
    for held in (found.codes, codes):
        held.clear()  # the encoders' codes want the room
    parts = [part for part in ENCODERS if config.encoder_bits and (parent.path / part).is_dir()]
    encoders: dict[str, object] = {part: _encoder(parent.path, part, draft, config) for part in parts}
    save_changed(draft, parent.path, {}, kept=("transformer", *encoders))
    own = {"weight_error_max": max(error.values()), "mean_bits": 8 * packed / sum(n * k for n, k in whole.values()), "packed_bytes": packed}
    metrics = found.metrics | own | ({"encoders": encoders} if encoders else {})
    return finish(draft, sampler.model_copy(update={"scales": found.scales}), recipe.bench, metrics=metrics)


def _encoder(source: Path, part: str, draft: Draft, config: QuantizeRecipe) -> dict[str, float]:
    """A text encoder rounded to `encoder_bits`, as the transformer is: its largest relative error and the bytes of its codes."""
    from torch import nn

    from flashgen.models.networks import empty_network
    from flashgen.quant.pack import dequantize
    from flashgen.quant.rounding import quantize_groups

    layers = {name for name, layer in empty_network(source, part).named_modules() if isinstance(layer, nn.Linear)}
    codes: dict[str, QuantizedLinear] = {}
    error = [0.0]

    def changed(name: str, weight: Tensor) -> Tensor:
        layer, _, own = name.rpartition(".")
        if own != "weight" or layer not in layers:
            return weight
        weight = weight.float()
        codes[layer] = quantize_groups(weight, config.encoder_bits, config.encoder_group, config.symmetric)
        made = dequantize(codes[layer])
        error.append(relative_error(made, weight))
        return made

    _rewrite(source / part, draft, changed, len(layers))
    return {"weight_error_max": max(error), "packed_bytes": _write_codes(draft, part, f"{part}.json", codes, {})}


def _write_codes(draft: Draft, part: str, specs: str, codes: Mapping[str, QuantizedLinear], more: dict[str, Tensor]) -> int:
    """quantized/`part`.safetensors with `more` behind the codes, and their bits and groups in `specs`; returns the tensors' bytes."""
    from flashgen.models.stream import write
    from flashgen.quant.layer import stored

    tensors = {f"{name}.{key}": t for name, q in codes.items() for key, t in stored(q).items()} | more
    shapes = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    write(draft.path / "quantized" / f"{part}.safetensors", shapes, tensors.items())
    told = {name: {"bits": q.bits, "group": q.group, "symmetric": q.zeros is None} for name, q in codes.items()}
    (draft.path / "quantized" / specs).write_text(json.dumps(told, indent=1) + "\n")
    return sum(t.nbytes for t in tensors.values())


def relative_error(made: Tensor, weight: Tensor) -> float:
    """|made - weight| / |weight|."""
    return float((made - weight).norm() / weight.norm().clamp_min(1e-12))


def shapes_of(pipeline: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every Linear of the transformer, by name, in the order of the network; from its config alone."""
    from flashgen.models.networks import empty_network, linears_of

    return {name: (layer.out_features, layer.in_features) for name, layer in linears_of(empty_network(pipeline, "transformer")).items()}


def _rewrite(source: Path, draft: Draft, changed: Callable[[str, Tensor], Tensor], layers: int) -> None:
    """A network's files with each tensor `changed` and in fp16, in the same shards; one tensor in memory at a time."""
    import torch

    from flashgen.models.stream import DTYPES, header, read, weight_files, write

    files = weight_files(source)
    target = draft.path / source.name
    target.mkdir()
    entries = {path: header(path)[0] for path in files}
    tick = iter(
        track(range(sum(map(len, entries.values()))), f"quantize {layers} layers of {source.name}", total=sum(map(len, entries.values())))
    )

    def halved(path: Path) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read(path):
            next(tick)
            yield name, changed(name, tensor).to(torch.float16) if tensor.is_floating_point() else tensor

    for path in files:
        kinds = {
            name: (DTYPES[e["dtype"]] if not DTYPES[e["dtype"]].is_floating_point else torch.float16, tuple(e["shape"]))
            for name, e in entries[path].items()
        }
        write(target / path.name, kinds, halved(path))
    next(tick, None)
    for path in source.iterdir():
        if path not in files and path.is_file():
            draft.link(path, f"{source.name}/{path.name}")
