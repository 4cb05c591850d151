"""What quantize learns by running the student: rounding for its inputs, bits by damage, a shared adaLN basis, scales of its steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.store import Artifact, Draft, open_artifact, versions
from flashgen.device.memory import parse_bytes
from flashgen.errors import UsageError
from flashgen.progress import say
from flashgen.recipe.schema import QuantizeRecipe, Recipe
from flashgen.stages.prompts import own_prompts

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


def calibrate(parent: Artifact, sampler: Sampler, recipe: Recipe, seed: int, draft: Draft) -> Found:
    """Everything that the recipe wants to know of the student; a resumed run reads what it has found in `draft.work`."""
    from flashgen.models.factored import Factored
    from flashgen.models.sample import load_pipeline
    from flashgen.quant.layer import quantize_layer
    from flashgen.training.calibration import quantize_in_order

    pipe, config = load_pipeline(parent.path), recipe.quantize
    calibration = _calibration(pipe, sampler, recipe, seed)
    weights = sum(layer.weight.numel() for layer in calibration.layers.values())
    metrics = _factor(calibration, config, draft.work) if config.basis_tolerance else {}
    layers = calibration.layers
    factored = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, Factored)}
    spare = next((2 * layer.basis.numel() for layer in factored.values()), 0)
    bits = {name: config.bits_of(name) for name in layers}
    if config.budget:
        bits = _allocate(layers, calibration, config, weights, spare, draft)

    def one(name: str, layer: nn.Linear, moments: dict[str, Tensor]) -> QuantizedLinear:
        return quantize_layer(layer.weight, bits[name], config, moments.get(name))

    done = quantize_in_order(layers, one, calibration if config.method == "gptq" else None, draft.work)
    metrics["latent_error"] = calibration.damage() ** 0.5
    scales = _repair(calibration, metrics) if config.repair else None
    return Found(done, factored, scales, metrics)


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


def _allocate(
    layers: dict[str, nn.Linear], calibration: Calibration, config: QuantizeRecipe, weights: int, spare: int, draft: Draft
) -> dict[str, int]:
    """Bits of each layer, by the damage that each group does alone, under the recipe's budget for a student of so many `weights`,
    of which `spare` bytes are spent.

    The whole table goes into the artifact, and a plot of it.
    """
    from flashgen.metrics.plots import plot_allocation
    from flashgen.quant.allocate import allocate
    from flashgen.quant.layer import quantize_layer, stored_bytes
    from flashgen.training.calibration import groups_of

    groups, choices = groups_of(list(layers)), [int(bits) for bits in config.choices]
    cost = {
        group: {bits: float(sum(stored_bytes(layers[name].weight, bits, config) for name in names)) for bits in choices}
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
    damage = calibration.sensitivity(groups, choices, lambda _, layer, bits: quantize_layer(layer.weight, bits, plain, None), path)
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
    keys = ("group", "symmetric", "basis_tolerance", "prompts", "prompts_file")
    for version in reversed(versions(draft.out)):
        made, table = open_artifact(version).manifest, version / "quantized" / "allocation.json"
        same = made.seed == draft.fields["seed"] and made.parents == draft.fields["parents"]
        if table.exists() and same and all(made.recipe.get(key) == draft.fields["recipe"].get(key) for key in keys):
            say(f"damage of groups of layers: as measured for {version}")
            return {group: row["damage"] for group, row in json.loads(table.read_text()).items()}
    return {}


def _repair(calibration: Calibration, metrics: dict[str, object]) -> list[tuple[float, float]] | None:
    scales, before, after = calibration.repair()
    metrics["repair"] = {"damage_before": before, "damage_after": after}
    helped = after < before
    if helped:
        metrics["latent_error"] = after**0.5
    say(f"repair: damage {before:.2e} -> {after:.2e} on held-out prompts{'' if helped else ', so the steps stay as they are'}")
    return scales if helped else None


def budget_bytes(text: str, weights: int) -> float:
    """`4.25` is mean bits a weight, scales and zero points included; `900MB` or `1.2GiB` is bytes."""
    return parse_bytes(text) if text[-1:].isalpha() else float(text) * weights / 8
