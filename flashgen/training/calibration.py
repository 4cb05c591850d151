"""Running a student to calibrate its quantization: the error of each group of layers, inputs of layers and their scales, scales of steps.

Errors are |z - z*|^2 / |z*|^2 of the final latents, z* being those of the student before quantization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.errors import NumericsError
from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.models.networks import linears_of
from flashgen.pixels import slices
from flashgen.progress import track
from flashgen.quant.activations import BINS, LEAST_RANGE, best_input_scale, rounded
from flashgen.quant.pack import InputScale, QuantizedLinear, dequantize
from flashgen.runtime.accelerator import exact
from flashgen.runtime.processes import rank
from flashgen.training.checkpoint import load_state, save_state
from flashgen.training.rollout import roll_out

BATCH = 32  # pictures drawn together

Quantize = Callable[[str, nn.Linear, Tensor | None], QuantizedLinear]  # of a layer's name, the layer, second moments of its inputs


def layer_groups(names: Iterable[str], family: Family) -> dict[str, list[str]]:
    """Layers that share their bits, by group: the layers of one class in one block; every other layer is a group of its own."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        block, layer_class = family.layer_group(name)
        groups[f"{block} {layer_class}" if layer_class else name].append(name)
    return dict(groups)


def layer_blocks(names: Iterable[str], family: Family) -> list[list[str]]:
    """Layers that are quantized together, in order: those of one block; a layer outside of the blocks is alone."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        blocks[family.layer_group(name)[0]].append(name)
    return list(blocks.values())


def static_candidates(names: Iterable[str], family: Family, protect: Sequence[str]) -> list[str]:
    """Layers that may have static activations: all but adaLN and those whose names start with an entry of `protect`."""
    modulation = family.modulation
    return [name for name in names if not name.startswith(tuple(protect)) and not (modulation and modulation.search(name))]


class Calibration:
    """Rollouts of a student along `nodes` from fixed `noise` [P, C, h, w] for fixed prompts `cond` (P rows).

    `states` [N+1, P, C, h, w] are those of the student when this object is made; errors of the student as it is later are against them.
    """

    def __init__(self, student: nn.Module, cond: Conditioning, noise: Tensor, nodes: Sequence[float]) -> None:
        self.student, self.cond, self.noise, self.nodes = student, cond, noise, list(nodes)
        self.states = self.rollouts()

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Every Linear of the student as it is now, by name."""
        return linears_of(self.student)

    @property
    def halves(self) -> tuple[slice, slice]:
        """Rows of prompts to fit something on, and rows to judge it by."""
        middle = (len(self.noise) + 1) // 2
        return slice(0, middle), slice(middle, len(self.noise))

    def rollouts(self, rows: slice = slice(None)) -> Tensor:
        """States [N+1, P, C, h, w] of the student as it is now, for the prompts at `rows`."""
        noise, cond, parts = self.noise[rows], self.cond[rows], slices(len(self.noise[rows]), BATCH)
        return torch.cat([torch.stack(roll_out(lambda _: self.student, noise[p], cond[p], self.nodes).states) for p in parts], 1)

    def inputs(self, name: str, rows: slice) -> Tensor:
        """Inputs of the layer `name` over all nodes and the prompts at `rows`, [nodes x prompts x tokens, K]."""
        seen: list[Tensor] = []
        with observed({name: self.layers[name]}, lambda _, x: seen.append(x)):
            self.rollouts(rows)
        return torch.cat(seen)

    def moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        """sum x x^T [K, K] of the inputs of each layer over all nodes, of the student as it is now."""
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            sums[name] = sums.get(name, 0) + x.T @ x

        layers = self.layers
        with observed({name: layers[name] for name in names}, add):
            self.rollouts()
        return sums

    def latent_error(self, rows: slice = slice(None)) -> float:
        """|z - z*|^2 / |z*|^2 of the student as it is now, for the prompts at `rows`."""
        return self._error(self.rollouts(rows)[-1], rows)

    def _error(self, latents: Tensor, rows: slice) -> float:
        target = self.states[-1, rows]
        return float((latents - target).square().sum() / target.square().sum())

    @torch.no_grad()
    def fit_step_scales(self) -> tuple[list[tuple[float, float]], float, float]:
        """(scales, error without them, error with them) of the student as it is now: steps a x + b (sigma' - sigma) v.

        a and b of a step are least squares onto `states`, over half of the prompts, after the scaled steps before it; both errors are over
        the other half. Source: Q-Sched (2509.01624), which searches a grid by a reward.
        """
        fit, held_out = self.halves
        x, scales = self.noise, []
        for index, (sigma, sigma_next) in enumerate(pairwise(self.nodes)):
            moved = (sigma_next - sigma) * self._velocity(x, sigma)
            where = exact(x.device)
            columns = torch.stack([x[fit].flatten(), moved[fit].flatten()], 1).to(where).double()
            a, b = torch.linalg.lstsq(columns, self.states[index + 1, fit].flatten().to(where).double()).solution.cpu().tolist()
            scales.append((a, b))
            x = a * x + b * moved
        return scales, self.latent_error(held_out), self._error(x[held_out], held_out)

    def _velocity(self, x: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(x),), sigma, device=x.device)
        return torch.cat([velocity(self.student, x[part], sigmas[part], self.cond[part]) for part in slices(len(x), BATCH)])

    def input_scales(self, names: Sequence[str], rows: slice) -> dict[str, InputScale]:
        """Scales of the inputs of the layers `names` over all nodes and the prompts at `rows`; raises NumericsError as `input_scales`."""
        layers, parts = self.layers, len(slices(len(self.noise[rows]), BATCH))
        return input_scales({name: layers[name] for name in names}, lambda: self.rollouts(rows), parts * (len(self.nodes) - 1))

    def sensitivity(
        self,
        groups: Mapping[str, Sequence[str]],
        choices: Sequence[int],
        changed: Callable[[Sequence[str], int], AbstractContextManager[None]],
        path: Path,
        rows: slice = slice(None),
    ) -> dict[str, dict[int, float]]:
        """Error of changing each group alone to each number of bits, for the prompts at `rows`.

        The layers of a group have these bits inside `changed(names, bits)`. Every number is saved in `path` at once, and read from there
        by a resumed run.
        """
        errors: dict[str, dict[str, float]] = load_state(path) or {}
        missing = [(group, bits) for group in groups for bits in choices if str(bits) not in errors.get(group, {})]
        for group, bits in track(missing, "sensitivity", total=len(missing)):
            with changed(groups[group], bits):
                errors.setdefault(group, {})[str(bits)] = self.latent_error(rows)
            if rank() == 0:
                save_state(errors, path)
        return {group: {bits: errors[group][str(bits)] for bits in choices} for group in groups}

    def quantize_in_order(self, quantize: Quantize, work: Path | None) -> dict[str, QuantizedLinear]:
        """Codes of every layer; the student keeps the dequantized weights.

        Block after block. With `work`, moments are measured behind the blocks that are quantized already, and finished blocks are saved
        there; without it, `quantize` gets no moments.
        """
        layers = self.layers
        blocks = layer_blocks(layers, self.cond.family)
        codes: dict[str, QuantizedLinear] = {}
        for number, names in enumerate(track(blocks, "quantize", total=len(blocks))):
            path = None if work is None else work / f"unit-{number:03d}.pt"
            saved: dict[str, dict[str, Any]] | None = None if path is None else load_state(path)
            if saved is not None:
                block = {name: QuantizedLinear(**fields) for name, fields in saved.items()}
            else:
                moments = {} if path is None else self.moments(names)
                block = {name: quantize(name, layers[name], moments.get(name)) for name in names}
                if path is not None and rank() == 0:
                    save_state({name: vars(q) for name, q in block.items()}, path)
            for name, q in block.items():
                layers[name].weight.data.copy_(dequantize(q))
            codes |= block
        return codes


@contextmanager
def observed(layers: Mapping[str, nn.Linear], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, call `look(name, x)` with the input x [M, K] of every pass through one of the `layers`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: look(name, inputs[0].reshape(-1, inputs[0].shape[-1]))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_weights(layers: Sequence[nn.Linear], change: Callable[[nn.Linear], Tensor]) -> Iterator[None]:
    """Inside, each layer has the weights `change(layer)`."""
    weights = [layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.weight.data.copy_(change(layer))
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)


@contextmanager
def with_rounded_inputs(layers: Mapping[str, nn.Linear], inputs: Mapping[str, InputScale | None]) -> Iterator[None]:
    """Inside, the layers that `inputs` names multiply their inputs `rounded` to 8 bits; None: by the range of each sample."""

    def hook(scale: InputScale | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, x: (rounded(x[0], scale),)

    handles = [layers[name].register_forward_pre_hook(hook(scale)) for name, scale in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_scales(layers: Mapping[str, nn.Linear], run: Callable[[], object], num_passes: int) -> dict[str, InputScale]:
    """Scales of the inputs of `layers` in `run`, which passes through each layer at least `num_passes` times.

    `run` is called twice: for the ranges, and for histograms over them. Raises NumericsError for a layer that runs less often, and for
    inputs that are not finite or all 0.
    """
    ranges: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    with observed(layers, lambda name, x: ranges[name].append((float(x.min()), float(x.max())))):
        run()
    ends: dict[str, tuple[float, float]] = {}
    for name, seen in ranges.items():
        mend = f'give {name} dynamic scales by naming it in quantize.protect, or check the student with "flashgen generate"'
        if len(seen) < num_passes:
            raise NumericsError(f"calibration: {name} ran in {len(seen)} of {num_passes} passes of the student; {mend}")
        if not all(map(isfinite, chain.from_iterable(seen))):
            raise NumericsError(f"calibration: an input of {name} is not finite; {mend}")
        ends[name] = min(0.0, *(low for low, _ in seen)), max(0.0, *(high for _, high in seen))
        if ends[name][1] - ends[name][0] < LEAST_RANGE:
            raise NumericsError(f"calibration: the inputs of {name} are all 0, so their scale would be 0; {mend}")
    counts: dict[str, Tensor] = {}

    def count(name: str, x: Tensor) -> None:
        counts[name] = counts.get(name, 0) + torch.histc(x.float(), BINS, *ends[name])

    with observed(layers, count):
        run()
    return {name: best_input_scale(counts[name], *ends[name]) for name in layers}
