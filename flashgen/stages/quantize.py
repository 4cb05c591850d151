"""flashgen quantize: group-wise INT4 and its neighbours for every linear layer of the transformer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.store import Artifact, Draft, begin, open_artifact, versions
from flashgen.device.memory import UNITS
from flashgen.errors import ArtifactError, UsageError
from flashgen.models.specs import ENCODERS
from flashgen.progress import say, track
from flashgen.recipe.schema import QuantizeRecipe, Recipe
from flashgen.stages import nf4
from flashgen.stages.plan import check
from flashgen.stages.prompts import own_prompts, prompts_key

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import Tensor, nn

    from flashgen.artifact.manifest import Sampler
    from flashgen.models.factored import Factored
    from flashgen.quant.pack import QuantizedLinear
    from flashgen.training.calibration import Calibration

CALIBRATION_STREAM = 16


@dataclass(frozen=True)
class Found:
    """What running the student taught: codes of every layer, adaLN layers that now have factors, scales of the steps."""

    codes: dict[str, QuantizedLinear] = field(default_factory=dict)
    factored: dict[str, Factored] = field(default_factory=dict)
    scales: list[tuple[float, float]] | None = None
    metrics: dict[str, object] = field(default_factory=dict)


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
    if sampler.guidance != 1 and (config.basis_tolerance or config.repair):
        raise UsageError(
            "quantize.basis_tolerance and quantize.repair learn from rollouts without guidance; a teacher has to do without them"
        )
    if config.scheme == "nf4":
        nf4.check_installed()
    calibrated = config.method == "gptq" or config.budget or config.basis_tolerance or config.repair
    check("quantize", parent, recipe, out)
    draft = begin(
        out, kind="quantized", stage="quantize", recipe=config.model_dump() | (prompts_key(recipe) if calibrated else {}), seed=seed,
        parents=[parent.as_parent("student")], force=force,
    )  # fmt: skip
    if isinstance(draft, Artifact):
        return draft
    if config.scheme == "nf4":
        return nf4.run(parent, sampler, recipe, draft)
    from flashgen.models.save import save_changed
    from flashgen.quant.pack import dequantize
    from flashgen.stages.report import finish

    (draft.path / "quantized").mkdir()
    found = _calibrated(parent, sampler, recipe, seed, draft) if calibrated else Found()
    codes, whole, error = dict(found.codes), shapes_of(parent.path / "transformer"), dict[str, float]()

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
                codes[layer] = _quantize(weight, _uniform(layer, config), config, None)
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

    tensors = {f"{name}.{key}": t for name, q in codes.items() for key, t in _stored(q).items()} | more
    shapes = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    write(draft.path / "quantized" / f"{part}.safetensors", shapes, tensors.items())
    told = {name: {"bits": q.bits, "group": q.group, "symmetric": q.zeros is None} for name, q in codes.items()}
    (draft.path / "quantized" / specs).write_text(json.dumps(told, indent=1) + "\n")
    return sum(t.nbytes for t in tensors.values())


def relative_error(made: Tensor, weight: Tensor) -> float:
    """|made - weight| / |weight|."""
    return float((made - weight).norm() / weight.norm().clamp_min(1e-12))


def shapes_of(folder: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every Linear of the transformer, by name, in the order of the network; from its config alone."""
    import torch
    from diffusers import SD3Transformer2DModel

    from flashgen.training.calibration import linears_of

    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder))
    return {name: (layer.out_features, layer.in_features) for name, layer in linears_of(network).items()}


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


def _calibrated(parent: Artifact, sampler: Sampler, recipe: Recipe, seed: int, draft: Draft) -> Found:
    from flashgen.models.factored import Factored
    from flashgen.models.sample import load_pipeline
    from flashgen.training.calibration import quantize_in_order

    pipe, config = load_pipeline(parent.path), recipe.quantize
    calibration = _calibration(pipe, sampler, recipe, seed)
    weights = sum(layer.weight.numel() for layer in calibration.layers.values())
    metrics = _factor(calibration, config, draft.work) if config.basis_tolerance else {}
    layers = calibration.layers
    factored = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, Factored)}
    spare = next((2 * layer.basis.numel() for layer in factored.values()), 0)
    bits = {name: _uniform(name, config) for name in layers}
    if config.budget:
        bits = _allocate(layers, calibration, config, weights, spare, draft)

    def one(name: str, layer: nn.Linear, moments: dict[str, Tensor]) -> QuantizedLinear:
        return _quantize(layer.weight, bits[name], config, moments.get(name))

    done = quantize_in_order(layers, one, calibration if config.method == "gptq" else None, draft.work)
    metrics["latent_error"] = calibration.damage() ** 0.5
    scales = _repair(calibration, metrics) if config.repair else None
    return Found(done, factored, scales, metrics)


def _repair(calibration: Calibration, metrics: dict[str, object]) -> list[tuple[float, float]] | None:
    scales, before, after = calibration.repair()
    metrics["repair"] = {"damage_before": before, "damage_after": after}
    helped = after < before
    if helped:
        metrics["latent_error"] = after**0.5
    say(f"repair: damage {before:.2e} -> {after:.2e} on held-out prompts{'' if helped else ', so the steps stay as they are'}")
    return scales if helped else None


def _factor(calibration: Calibration, config: QuantizeRecipe, work: Path) -> dict[str, object]:
    """Put the student's adaLN layers on the smallest basis, in whole groups, whose damage the recipe tolerates, and say which.

    It is fitted on half of the prompts and judged on the other half, once: codes of a resumed run belong to the same basis.
    """
    import torch

    from flashgen.models.factored import factor, modulations, put, shared_basis
    from flashgen.training.loop import save_state

    student, path = calibration.student, work / "basis.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["metrics"]["basis_rank"]:
            factor(student, saved["basis"], saved["ups"], saved["biases"])
        return dict(saved["metrics"])
    layers, (fit, held) = modulations(student), calibration.halves
    down, columns, mean = shared_basis([layer.weight for layer in layers.values()], calibration.inputs(next(iter(layers)), fit))
    found: dict[str, Any] = {"metrics": {"basis_rank": 0}}
    tried: list[str] = []
    assert config.group != "channel"
    for rank in range(config.group, len(down) // 2 + 1, config.group):
        basis = down[:, :rank].half().float()
        ups = {name: (layer.weight.double() @ columns[:, :rank]).float() for name, layer in layers.items()}
        lost = {name: layer.weight.double() - ups[name].double() @ basis.double().T for name, layer in layers.items()}
        biases = {name: (layer.bias.double() + lost[name] @ mean).float() for name, layer in layers.items()}
        factor(student, basis, ups, biases)
        damage = calibration.damage(held)
        tried.append(f"{damage:.1e} at {rank}")
        if damage <= config.basis_tolerance:
            found = {"basis": basis, "ups": ups, "biases": biases, "metrics": {"basis_rank": rank, "basis_damage": damage}}
            say(f"adaLN on a shared basis of {rank} of {len(down)}: damage {damage:.1e} to the final latents of held-out prompts")
            break
        for name, layer in layers.items():
            put(student, name, layer)
    else:
        least, most = f"{config.basis_tolerance:g} or less", f"half of {len(down)} in groups of {config.group}"
        results = ", ".join(tried) or "a group is wider than that"
        say(f"adaLN stays whole: no shared basis of up to {most} does damage of {least} to the final latents ({results})")
    save_state(found, path)
    return dict(found["metrics"])


def _uniform(name: str, config: QuantizeRecipe) -> int:
    return 8 if name.startswith(tuple(config.protect)) else config.bits


def _quantize(weight: Tensor, bits: int, config: QuantizeRecipe, moments: Tensor | None) -> QuantizedLinear:
    from flashgen.quant.gptq import gptq
    from flashgen.quant.rounding import quantize_groups

    if config.method == "gptq" and moments is not None:
        return gptq(weight, moments, bits, config.group_of(weight.shape[1]), config.symmetric)
    return quantize_groups(weight, bits, config.group_of(weight.shape[1]), config.symmetric, "hqq" if _unpacked(bits, config) else "mse")


def _unpacked(bits: int, config: QuantizeRecipe) -> bool:
    """Whether zero points lie between codes: HQQ's do, but onnxruntime's CPU kernel takes whole ones only at 8 bits."""
    return config.method == "hqq" and bits < 8


def _stored(q: QuantizedLinear) -> dict[str, Tensor]:
    """Tensors as the artifact keeps them: scales, and zero points between codes, as the fp16 that they are."""
    found = {"codes": q.codes, "scales": q.scales.half()}
    if q.zeros is not None:
        found["zeros"] = q.zeros.half() if q.zeros.is_floating_point() else q.zeros
    return found


def _calibration(pipe: StableDiffusion3Pipeline, sampler: Sampler, recipe: Recipe, seed: int) -> Calibration:
    import torch

    from flashgen.models.sample import latent_shape
    from flashgen.randomness import generator
    from flashgen.training.calibration import Calibration
    from flashgen.training.prompts import prompt_pool

    count = recipe.quantize.prompts
    pool = prompt_pool(pipe, count, seed + 4, sampler.t5_tokens, own=own_prompts(recipe))
    noise = torch.randn((count, *latent_shape(pipe, sampler.size_px)), generator=generator(seed, CALIBRATION_STREAM))
    return Calibration(pipe.transformer, pool.cond, noise, sampler.sigmas)


def _allocate(
    layers: dict[str, nn.Linear], calibration: Calibration, config: QuantizeRecipe, weights: int, spare: int, draft: Draft
) -> dict[str, int]:
    """Bits of each layer, by the damage that each group does alone, under the recipe's budget for a student of so many `weights`,
    of which `spare` bytes are spent.

    The whole table goes into the artifact, and a plot of it.
    """
    from flashgen.metrics.plots import plot_allocation
    from flashgen.quant.allocate import allocate
    from flashgen.training.calibration import groups_of

    groups, choices = groups_of(list(layers)), [int(bits) for bits in config.choices]
    cost = {
        group: {bits: float(sum(_bytes(layers[name].weight, bits, config) for name in names)) for bits in choices}
        for group, names in groups.items()
    }
    budget = budget_bytes(str(config.budget), weights)
    smallest = spare + sum(options[min(choices)] for options in cost.values())
    if budget < smallest:
        raise UsageError(
            f"a budget of {config.budget} is {budget:.0f} bytes for {weights} weights; with quantize.choices={choices} and "
            f"quantize.group={config.group} the smallest is {smallest:.0f} bytes, {8 * smallest / weights:.3f} mean bits"
        )
    plain = config.model_copy(update={"method": "rtn"})  # data-free: GPTQ's own gain is much the same everywhere (our choice)
    path = draft.work / "sensitivity.json"
    if not path.exists() and (known := _known_damage(draft)):
        path.write_text(json.dumps(known))
    damage = calibration.sensitivity(groups, choices, lambda _, layer, bits: _quantize(layer.weight, bits, plain, None), path)
    chosen = allocate(damage, cost, budget - spare)
    table = {group: {"layers": groups[group], "bits": chosen[group], "damage": damage[group], "bytes": cost[group]} for group in groups}
    (draft.path / "quantized" / "allocation.json").write_text(json.dumps(table, indent=1) + "\n")
    plot_allocation(table, draft.path / "quantized" / "allocation.png")
    spent = spare + sum(cost[group][bits] for group, bits in chosen.items())
    count = {bits: list(chosen.values()).count(bits) for bits in choices}
    say(f"{spent:.0f} of {budget:.0f} bytes, {8 * spent / weights:.3f} mean bits; groups of layers by bits: {count}")
    return {name: chosen[group] for group, names in groups.items() for name in names}


def _known_damage(draft: Draft) -> dict[str, dict[str, float]]:
    """What another version of the same folder measured on the same student, prompts and groups: another budget costs no new table."""
    keys = ("group", "symmetric", "basis_tolerance", "prompts")
    for version in reversed(versions(draft.out)):
        made, table = open_artifact(version).manifest, version / "quantized" / "allocation.json"
        same = made.seed == draft.fields["seed"] and made.parents == draft.fields["parents"]
        if table.exists() and same and all(made.recipe[key] == draft.fields["recipe"][key] for key in keys):
            say(f"damage of groups of layers: as measured for {version}")
            return {group: row["damage"] for group, row in json.loads(table.read_text()).items()}
    return {}


def _bytes(weight: Tensor, bits: int, config: QuantizeRecipe) -> int:
    """Of the stored codes, scales and zero points."""
    n, k = weight.shape
    group = config.group_of(weight.shape[1])
    blocks = -(-k // group)
    zeros = 0 if config.symmetric else 2 * blocks if _unpacked(bits, config) else -(-blocks * bits // 8)
    return int(n * (blocks * group * bits // 8 + 2 * blocks + zeros))


def budget_bytes(text: str, weights: int) -> float:
    """`4.25` is mean bits a weight, scales and zero points included; `900MB` or `1.2GiB` is bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"a budget is mean bits (4.25) or bytes (900MB, 1.2GiB), not {text!r}")
    number, unit = float(found[1]), found[2]
    return number * UNITS[unit.upper()] if unit else number * weights / 8
