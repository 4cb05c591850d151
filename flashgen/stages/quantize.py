"""flashgen quantize: group-wise INT4 and its neighbours for every linear layer of the transformer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.store import Artifact, Draft, begin, open_artifact
from flashgen.errors import UsageError
from flashgen.progress import say
from flashgen.recipe.schema import QuantizeRecipe, Recipe

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import Tensor, nn

    from flashgen.artifact.manifest import Sampler
    from flashgen.quant.pack import QuantizedLinear
    from flashgen.training.calibration import Calibration

CALIBRATION_STREAM = 16
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(student: str, out: Path, recipe: Recipe, seed: int, force: bool) -> Artifact:
    """Round to nearest and HQQ need no data and are linear in the weights; GPTQ and a budget run the student on its own prompts.

    The folder stays loadable by diffusers (dequantized weights); the codes that `export` writes are in quantized/.
    """
    config = recipe.quantize
    parent = open_artifact(student, ("student",))
    sampler = parent.manifest.sampler
    assert sampler is not None
    draft = begin(
        out, kind="quantized", stage="quantize", recipe=config.model_dump(), seed=seed, parents=[parent.as_parent("student")], force=force
    )
    if isinstance(draft, Artifact):
        return draft
    from safetensors.torch import save_file

    from flashgen.models.sample import load_pipeline
    from flashgen.models.save import save_changed
    from flashgen.stages.report import finish
    from flashgen.training.calibration import linears_of, quantize_in_order

    pipe = load_pipeline(parent.path)
    layers = linears_of(pipe.transformer)
    calibration = _calibration(pipe, sampler, config, seed) if config.method == "gptq" or config.budget else None
    bits = _allocate(layers, calibration, config, draft) if calibration and config.budget else _uniform(layers, config)

    def one(name: str, layer: nn.Linear, moments: dict[str, Tensor]) -> QuantizedLinear:
        return _quantize(layer.weight, bits[name], config, moments.get(name))

    done, error = quantize_in_order(layers, one, calibration if config.method == "gptq" else None, draft.work)
    tensors = {f"{name}.{part}": t for name, q in done.items() for part, t in _stored(q).items()}
    folder = draft.path / "quantized"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "transformer.safetensors")
    specs = {name: {"bits": q.bits, "group": q.group, "symmetric": q.zeros is None} for name, q in done.items()}
    (folder / "layers.json").write_text(json.dumps(specs, indent=1) + "\n")
    metrics: dict[str, object] = {"weight_error_max": max(error.values())}
    if calibration:
        metrics["latent_error"] = calibration.damage() ** 0.5
    save_changed(draft, parent.path, {"transformer": pipe.transformer})
    packed = sum(t.numel() * t.element_size() for t in tensors.values())
    metrics |= {"mean_bits": 8 * packed / sum(layer.weight.numel() for layer in layers.values()), "packed_bytes": packed}
    return finish(draft, sampler, recipe.bench, metrics=metrics)


def _uniform(layers: dict[str, nn.Linear], config: QuantizeRecipe) -> dict[str, int]:
    return {name: 8 if name.startswith(tuple(config.protect)) else config.bits for name in layers}


def _quantize(weight: Tensor, bits: int, config: QuantizeRecipe, moments: Tensor | None) -> QuantizedLinear:
    from flashgen.quant.gptq import gptq
    from flashgen.quant.rounding import quantize_groups

    if config.method == "gptq" and moments is not None:
        return gptq(weight, moments, bits, config.group, config.symmetric)
    return quantize_groups(weight, bits, config.group, config.symmetric, "hqq" if _unpacked(bits, config) else "mse")


def _unpacked(bits: int, config: QuantizeRecipe) -> bool:
    """Whether zero points lie between codes: HQQ's do, but onnxruntime's CPU kernel takes whole ones only at 8 bits."""
    return config.method == "hqq" and bits < 8


def _stored(q: QuantizedLinear) -> dict[str, Tensor]:
    """Tensors as the artifact keeps them: scales, and zero points between codes, as the fp16 that they are."""
    found = {"codes": q.codes, "scales": q.scales.half()}
    if q.zeros is not None:
        found["zeros"] = q.zeros.half() if q.zeros.is_floating_point() else q.zeros
    return found


def _calibration(pipe: StableDiffusion3Pipeline, sampler: Sampler, config: QuantizeRecipe, seed: int) -> Calibration:
    import torch

    from flashgen.randomness import generator
    from flashgen.training.calibration import Calibration
    from flashgen.training.prompts import prompt_pool

    pool = prompt_pool(pipe, config.prompts, seed + 4, sampler.t5_tokens)
    shape = (pipe.transformer.config.in_channels, sampler.size_px // 8, sampler.size_px // 8)
    noise = torch.randn((config.prompts, *shape), generator=generator(seed, CALIBRATION_STREAM))
    return Calibration(pipe.transformer, pool.cond, noise, sampler.sigmas)


def _allocate(layers: dict[str, nn.Linear], calibration: Calibration, config: QuantizeRecipe, draft: Draft) -> dict[str, int]:
    """Bits of each layer under the budget, by the damage that each group does alone; the whole table goes into the artifact."""
    from flashgen.quant.allocate import allocate
    from flashgen.training.calibration import groups_of

    groups, choices = groups_of(list(layers)), [int(bits) for bits in config.choices]
    cost = {
        group: {bits: float(sum(_bytes(layers[name].weight, bits, config) for name in names)) for bits in choices}
        for group, names in groups.items()
    }
    weights = sum(layer.weight.numel() for layer in layers.values())
    budget = budget_bytes(str(config.budget), weights)
    smallest = sum(options[min(choices)] for options in cost.values())
    if budget < smallest:
        raise UsageError(
            f"a budget of {config.budget} is {budget:.0f} bytes for {weights} weights; with quantize.choices={choices} and "
            f"quantize.group={config.group} the smallest is {smallest:.0f} bytes, {8 * smallest / weights:.3f} mean bits"
        )
    plain = config.model_copy(update={"method": "rtn"})  # data-free: GPTQ's own gain is much the same everywhere (our choice)
    damage = calibration.sensitivity(
        groups, choices, lambda _, layer, bits: _quantize(layer.weight, bits, plain, None), draft.work / "sensitivity.json"
    )
    chosen = allocate(damage, cost, budget)
    table = {group: {"layers": groups[group], "bits": chosen[group], "damage": damage[group], "bytes": cost[group]} for group in groups}
    (draft.path / "quantized").mkdir()
    (draft.path / "quantized" / "allocation.json").write_text(json.dumps(table, indent=1) + "\n")
    spent = sum(cost[group][bits] for group, bits in chosen.items())
    count = {bits: list(chosen.values()).count(bits) for bits in choices}
    say(f"{spent:.0f} of {budget:.0f} bytes, {8 * spent / weights:.3f} mean bits; groups of layers by bits: {count}")
    return {name: chosen[group] for group, names in groups.items() for name in names}


def _bytes(weight: Tensor, bits: int, config: QuantizeRecipe) -> int:
    """Of the stored codes, scales and zero points."""
    n, k = weight.shape
    blocks = -(-k // config.group)
    zeros = 0 if config.symmetric else 2 * blocks if _unpacked(bits, config) else -(-blocks * bits // 8)
    return int(n * (blocks * config.group * bits // 8 + 2 * blocks + zeros))


def budget_bytes(text: str, weights: int) -> float:
    """`4.25` is mean bits a weight, scales and zero points included; `900MB` or `1.2GiB` is bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"a budget is mean bits (4.25) or bytes (900MB, 1.2GiB), not {text!r}")
    number, unit = float(found[1]), found[2]
    return number * UNITS[unit.upper()] if unit else number * weights / 8
