"""The part of quantize that runs the student: GPTQ, bits by measured error, scales of inputs, a shared adaLN basis, scales of its steps."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import sha256
from flashgen.artifact.store import open_artifact, versions
from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say
from flashgen.quant.layer import Rounding, layer_bits, quantize_layer, stored_bytes
from flashgen.recipe.compression import QuantizeRecipe
from flashgen.runtime import processes
from flashgen.runtime.accelerator import exact
from flashgen.stages.base import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashgen.families.base import Family
    from flashgen.models.factored import SharedLowRank
    from flashgen.models.pipeline import Pipeline
    from flashgen.quant.pack import InputScale, QuantizedLinear
    from flashgen.training.calibration import Calibration

ALLOCATION, SENSITIVITY = "quantized/allocation.json", "sensitivity.pt"  # in a version; in the resume state
ACTIVATIONS = "quantized/activations.json"  # in a version
CALIBRATION_STREAM, CALIBRATION_SEED = 16, 4  # of the noise; added to the seed for the prompts


@dataclass(frozen=True)
class Calibrated:
    """Results of the student's rollouts: codes of every layer, the adaLN layers that are factored now, scales of the steps."""

    codes: dict[str, QuantizedLinear] = field(default_factory=dict)
    factored: dict[str, SharedLowRank] = field(default_factory=dict)
    scales: list[tuple[float, float]] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def calibrate(stage: Stage, draft: Draft, rounding: Rounding, protect: Sequence[str]) -> Calibrated:
    """Run the student for everything that the recipe asks of it; a resumed run reads earlier results in `draft.work`."""
    from flashgen.models.factored import SharedLowRank
    from flashgen.models.pipeline import load_pipeline
    from flashgen.training.calibration import with_rounded_inputs

    pipe, config = load_pipeline(stage.source.path, device=stage.device), stage.recipe.quantize
    calibration = _calibration(pipe, stage)
    num_weights, where = sum(layer.weight.numel() for layer in calibration.layers.values()), exact(stage.device)
    metrics = _factor(calibration, stage.family, config, draft.work) if config.low_rank_tolerance else {}
    factored = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, SharedLowRank)}
    basis_bytes = next((2 * layer.basis.numel() for layer in factored.values()), 0)
    bits = {name: layer_bits(name, config.bits, protect) for name in calibration.layers}
    if config.budget:
        budget = budget_bytes(config.budget, num_weights)
        bits = _allocate(calibration, stage.family, config, rounding, (budget, basis_bytes, num_weights), draft)
    static = _static_inputs(calibration, stage.family, config, protect, draft) if config.activations == "static" else {}

    def quantize(name: str, layer: nn.Linear, moments: Tensor | None) -> QuantizedLinear:
        moments = None if moments is None else moments.to(where)
        return quantize_layer(layer.weight.to(where), bits[name], rounding, moments, static.get(name)).cpu()

    codes = calibration.quantize_in_order(quantize, draft.work if config.method == "gptq" else None)
    inputs = {name: q.inputs for name, q in codes.items()} if config.activations == "static" else {}
    with with_rounded_inputs(calibration.layers, inputs):
        metrics["latent_error"] = calibration.latent_error() ** 0.5
        scales = _fit_step_scales(calibration, metrics) if config.step_scales else None
    for module in factored.values():
        module.cpu()
    return Calibrated(codes, factored, scales, metrics)


def _calibration(pipe: Pipeline, stage: Stage) -> Calibration:
    """Rollouts of the student on training prompts, with noise that depends on the seed."""
    import torch

    from flashgen.models.prompts import encode_prompts
    from flashgen.models.sample import latent_shape
    from flashgen.randomness import generator
    from flashgen.training.calibration import Calibration

    count, sampler = stage.recipe.quantize.prompts, stage.sampler
    prompts = stage.training_prompts(count, stage.seed + CALIBRATION_SEED)
    noise = torch.randn((count, *latent_shape(pipe, sampler.size_px)), generator=generator(stage.seed, CALIBRATION_STREAM)).to(stage.device)
    return Calibration(pipe.transformer, encode_prompts(pipe, prompts, sampler), noise, sampler.sigmas)


def _factor(calibration: Calibration, family: Family, config: QuantizeRecipe, work: Path) -> dict[str, Any]:
    """Put the student's adaLN layers on the smallest shared basis whose error the recipe tolerates; returns the metrics.

    Ranks are whole groups. The basis is fitted on half of the prompts and judged on the other half. It is computed once: the codes of a
    resumed run belong to the same basis.
    """

    from flashgen.models.factored import factor, modulations, replace_layer, shared_basis
    from flashgen.training.checkpoint import load_state, save_state

    student, path, where = calibration.student, work / "basis.pt", exact(calibration.noise.device)
    if (saved := load_state(path)) is not None:
        if saved["metrics"]["basis_rank"]:
            factor(student, saved["basis"], saved["ups"], saved["biases"])
        return dict(saved["metrics"])
    if processes.rank() == 0:
        for other in (*work.glob("unit-*.pt"), *work.glob(SENSITIVITY)):
            other.unlink()  # results with a basis that is lost
    layers, (fit, held_out) = modulations(student, family), calibration.halves
    assert layers and config.group != "channel"
    original = {name: (layer.weight.to(where).double(), layer.bias.to(where).double()) for name, layer in layers.items()}
    down, columns, mean = shared_basis([weight for weight, _ in original.values()], calibration.inputs(next(iter(layers)), fit).to(where))
    result: dict[str, Any] = {"metrics": {"basis_rank": 0}}
    tried: list[str] = []
    for rank in range(config.group, len(down) // 2 + 1, config.group):
        basis = down[:, :rank].half().float()
        ups = {name: (weight @ columns[:, :rank]).float() for name, (weight, _) in original.items()}
        lost = {name: weight - ups[name].double() @ basis.double().T for name, (weight, _) in original.items()}
        biases = {name: (bias + lost[name] @ mean).float() for name, (_, bias) in original.items()}
        factor(student, basis, ups, biases)
        error = calibration.latent_error(held_out)
        tried.append(f"{error:.1e} at {rank}")
        if error <= config.low_rank_tolerance:
            parts = {"ups": {k: v.cpu() for k, v in ups.items()}, "biases": {k: v.cpu() for k, v in biases.items()}}
            result = {"basis": basis.cpu(), **parts, "metrics": {"basis_rank": rank, "basis_damage": error}}
            say(f"adaLN on a shared basis of {rank} of {len(down)}: error {error:.1e} of the final latents of held-out prompts")
            break
        for name, layer in layers.items():
            replace_layer(student, name, layer)
    else:
        largest = f"up to half of {len(down)} in groups of {config.group}"
        errors = ", ".join(tried) or "a group is wider than that"
        say(f"adaLN stays whole: no shared basis of {largest} has an error of {config.low_rank_tolerance:g} or less ({errors})")
    if processes.rank() == 0:
        save_state(result, path)
    return dict(result["metrics"])


def _allocate(
    calibration: Calibration, family: Family, config: QuantizeRecipe, rounding: Rounding, sizes: tuple[float, int, int], draft: Draft
) -> dict[str, int]:
    """Bits of each layer by the error that its group causes alone; `sizes` are (budget in bytes, bytes of the basis, number of weights).

    The whole table and a plot of it go into the draft. Raises UsageError when the budget is below the smallest possible size.
    """
    from flashgen.metrics.plots import plot_allocation
    from flashgen.quant.allocate import allocate
    from flashgen.quant.pack import dequantize
    from flashgen.training.calibration import layer_groups, with_weights
    from flashgen.training.checkpoint import save_state

    layers, (budget, basis_bytes, num_weights) = calibration.layers, sizes
    groups, choices = layer_groups(layers, family), [int(bits) for bits in config.choices]
    cost = {
        group: {bits: float(sum(stored_bytes(layers[name].weight.shape, bits, rounding) for name in names)) for bits in choices}
        for group, names in groups.items()
    }
    smallest = basis_bytes + sum(options[min(choices)] for options in cost.values())
    if budget < smallest:
        raise UsageError(
            f"a budget of {config.budget} is {budget:.0f} bytes for {num_weights} weights; with quantize.choices={choices} and "
            f"quantize.group={config.group} the smallest is {smallest:.0f} bytes, {8 * smallest / num_weights:.3f} mean bits"
        )
    path = draft.work / SENSITIVITY
    if processes.rank() == 0 and not path.exists() and (known := _known_errors(draft)):
        save_state(dict(known), path)
    nearest = replace(rounding, method="rtn")  # without data: GPTQ gains about as much in every group (our choice)

    def changed(names: Sequence[str], bits: int) -> AbstractContextManager[None]:
        return with_weights([layers[name] for name in names], lambda layer: dequantize(quantize_layer(layer.weight, bits, nearest)))

    error = calibration.sensitivity(groups, choices, changed, path)
    chosen = allocate(error, cost, budget - basis_bytes)
    table = {group: {"layers": groups[group], "bits": chosen[group], "damage": error[group], "bytes": cost[group]} for group in groups}
    (draft.path / ALLOCATION).write_text(json.dumps(table, indent=1) + "\n")
    plot_allocation(table, draft.path / "quantized" / "allocation.png")
    spent = basis_bytes + sum(cost[group][bits] for group, bits in chosen.items())
    count = {bits: list(chosen.values()).count(bits) for bits in choices}
    say(f"{spent:.0f} of {budget:.0f} bytes, {8 * spent / num_weights:.3f} mean bits; groups of layers by bits: {count}")
    return {name: chosen[group] for group, names in groups.items() for name in names}


def _static_inputs(
    calibration: Calibration, family: Family, config: QuantizeRecipe, protect: Sequence[str], draft: Draft
) -> dict[str, InputScale]:
    """Scales of the inputs of all layers that run with static activations.

    adaLN and the layers in `protect` stay dynamic. Of the others, groups of layers are taken in the order of the error that each causes
    alone, as many as the recipe's tolerance allows together. Scales are fitted on half of the prompts, errors are measured on the other
    half, without rounding of weights. The table goes into the draft.
    """
    from flashgen.training.calibration import layer_groups, static_candidates, with_rounded_inputs

    layers, (fit, held_out) = calibration.layers, calibration.halves
    names = static_candidates(layers, family, protect)
    scales, groups = calibration.input_scales(names, fit), layer_groups(names, family)

    def changed(members: Sequence[str], _: int) -> AbstractContextManager[None]:
        return with_rounded_inputs(layers, {name: scales[name] for name in members})

    errors = calibration.sensitivity(groups, [8], changed, draft.work / SENSITIVITY, held_out)
    damage = {group: error[8] for group, error in errors.items()}
    order = sorted(groups, key=damage.__getitem__)

    def error(count: int) -> float:
        with changed([name for group in order[:count] for name in groups[group]], 8):
            return calibration.latent_error(held_out)

    static = order[: bisect_right(range(1, len(order) + 1), config.activation_tolerance, key=error)]
    table = {group: {"layers": groups[group], "static": group in static, "damage": damage[group]} for group in groups}
    (draft.path / ACTIVATIONS).write_text(json.dumps(table, indent=1) + "\n")
    say(f"static activations in {len(static)} of {len(order)} groups of layers; {len(layers) - len(names)} layers stay dynamic besides")
    return {name: scales[name] for group in static for name in groups[group]}


def _known_errors(draft: Draft) -> Mapping[str, Mapping[str, float]]:
    """Errors that another version in the same folder measured on the same student, prompts and groups: a new budget needs no new table."""
    keys, origin = ("group", "symmetric", "low_rank_tolerance", "prompts", "prompts_file", "prompts_read"), draft.origin
    digests = [parent.digest for parent in origin.parents]
    for version in reversed(versions(draft.out)):
        table = version / ALLOCATION
        try:
            manifest = open_artifact(version).manifest
            if sha256(table) not in {file.sha256 for file in manifest.files if file.path == ALLOCATION}:
                continue
        except (ArtifactError, OSError):
            continue  # an old version that is broken, or has no table, is no reason to stop
        same_inputs = manifest.seed == origin.seed and [parent.digest for parent in manifest.parents] == digests
        if same_inputs and all(manifest.recipe.get(key) == origin.settings.get(key) for key in keys):
            say(f"errors of groups of layers: as measured for {version}")
            return {group: row["damage"] for group, row in json.loads(table.read_text()).items()}
    return {}


def _fit_step_scales(calibration: Calibration, metrics: dict[str, Any]) -> list[tuple[float, float]] | None:
    """Scales of the steps that lower the error on held-out prompts, or None where they do not; adds to `metrics`."""
    scales, before, after = calibration.fit_step_scales()
    metrics["step_scales"] = {"damage_before": before, "damage_after": after}
    better = after < before
    if better:
        metrics["latent_error"] = after**0.5
    say(f"step scales: error {before:.2e} -> {after:.2e} on held-out prompts{'' if better else ', so the steps stay as they are'}")
    return scales if better else None


def budget_bytes(text: str, num_weights: int) -> float:
    """Bytes of a budget: `4.25` is mean bits per weight, scales and zero points included; `900MB` or `1.2GiB` is bytes."""
    from flashgen.runtime.memory import parse_bytes

    return parse_bytes(text) if text[-1:].isalpha() else float(text) * num_weights / 8
