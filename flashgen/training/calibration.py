"""Running a student to calibrate its quantization: the error of each group of layers, the inputs of each layer, scales of its steps.

Errors are |z - z*|^2 / |z*|^2 of the final latents, z* being those of the student before quantization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.models.networks import linears_of
from flashgen.pixels import slices
from flashgen.progress import track
from flashgen.quant.pack import QuantizedLinear, dequantize
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

    def sensitivity(
        self,
        groups: Mapping[str, Sequence[str]],
        choices: Sequence[int],
        quantize: Callable[[nn.Linear, int], QuantizedLinear],
        path: Path,
    ) -> dict[str, dict[int, float]]:
        """Error of quantizing each group alone at each number of bits; weights are restored.

        Every number is saved in `path` at once, and read from there by a resumed run.
        """
        errors: dict[str, dict[str, float]] = load_state(path) or {}
        layers = self.layers
        missing = [(group, bits) for group in groups for bits in choices if str(bits) not in errors.get(group, {})]
        for group, bits in track(missing, "sensitivity", total=len(missing)):
            members = [layers[name] for name in groups[group]]
            with restored(members):
                for layer in members:
                    layer.weight.data.copy_(dequantize(quantize(layer, bits)))
                errors.setdefault(group, {})[str(bits)] = self.latent_error()
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
def restored(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Give the layers their weights back on leaving."""
    weights = [layer.weight.detach().clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data.copy_(weight)
