"""What quantization learns from the student's own rollouts: how much each group of layers hurts, and what its inputs look like."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.models.networks import linears_of
from flashgen.models.text import Conditioning
from flashgen.progress import track
from flashgen.quant.pack import QuantizedLinear, dequantize
from flashgen.training.loop import save_state
from flashgen.training.trajectories import roll_out, velocity

BATCH = 32
CLASSES = {
    r"\.attn2?\.(to_[qkv]|add_[qkv]_proj)$": "attention in",
    r"\.attn2?\.(to_out\.0|to_add_out)$": "attention out",
    r"\.ff(_context)?\.net\.0\.proj$": "feed-forward up",
    r"\.ff(_context)?\.net\.2$": "feed-forward down",
    r"\.norm1\.linear(\.up)?$": "adaLN image",
    r"\.norm1_context\.linear(\.up)?$": "adaLN text",
}
Quantize = Callable[[str, nn.Linear, int], QuantizedLinear]


def unit_of(name: str) -> str:
    """The transformer block of a layer, or the layer itself outside of them."""
    found = re.match(r"transformer_blocks\.\d+", name)
    return found[0] if found else name


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers that share their bits: those of one class in one block; each layer outside of the blocks by itself."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kind = next((kind for pattern, kind in CLASSES.items() if re.search(pattern, name)), None)
        groups[f"{unit_of(name)} {kind}" if kind else name].append(name)
    return dict(groups)


class Calibration:
    """Rollouts of a student from fixed noise for fixed prompts, `cond` [P, ...], `noise` [P, C, H, W]."""

    def __init__(self, student: nn.Module, cond: Conditioning, noise: Tensor, nodes: list[float]) -> None:
        self.student, self.cond, self.noise, self.nodes = student, cond, noise, nodes
        self.states = self.rollouts()

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Of the student as it is now."""
        return linears_of(self.student)

    @property
    def halves(self) -> tuple[slice, slice]:
        """Prompts to fit something on, and others to judge it by."""
        middle = (len(self.noise) + 1) // 2
        return slice(0, middle), slice(middle, len(self.noise))

    def inputs(self, name: str, rows: slice) -> Tensor:
        """What the layer sees over all nodes and those prompts, [nodes x prompts, K]."""
        found: list[Tensor] = []
        handle = self.layers[name].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
        try:
            self.rollouts(rows)
        finally:
            handle.remove()
        return torch.cat(found)

    def rollouts(self, rows: slice = slice(None)) -> Tensor:
        """States [N+1, P, C, H, W] of the student as it is now."""
        noise, cond = self.noise[rows], self.cond[rows]
        parts = [slice(i, i + BATCH) for i in range(0, len(noise), BATCH)]
        return torch.cat([torch.stack(roll_out(lambda _: self.student, noise[p], cond[p], self.nodes).states) for p in parts], 1)

    def damage(self, rows: slice = slice(None)) -> float:
        """|latents - those at first|^2 / |those at first|^2 of the student as it is now."""
        return self._lost(self.rollouts(rows)[-1], rows)

    def _lost(self, finals: Tensor, rows: slice) -> float:
        whole = self.states[-1, rows]
        return float((finals - whole).square().sum() / whole.square().sum())

    @torch.no_grad()
    def repair(self) -> tuple[list[tuple[float, float]], float, float]:
        """(scales, damage without, damage with) of the student as it is now: steps a x + b (sigma' - sigma) v that bring it back.

        a and b of a step are least squares onto the states at first, over half of the prompts, behind the repaired steps before
        it; the damages are over the other half. Source: Q-Sched (2509.01624), which searches a grid by a reward.
        """
        fit, held = self.halves
        x, scales = self.noise, []
        for index, (s, s_next) in enumerate(itertools.pairwise(self.nodes)):
            moved = (s_next - s) * self._velocity(x, s)
            columns = torch.stack([x[fit].flatten(), moved[fit].flatten()], 1).double()
            a, b = torch.linalg.lstsq(columns, self.states[index + 1, fit].flatten().double()).solution.tolist()
            scales.append((a, b))
            x = a * x + b * moved
        return scales, self.damage(held), self._lost(x[held], held)

    def _velocity(self, x: Tensor, sigma: float) -> Tensor:
        parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
        return torch.cat([velocity(self.student, x[p], torch.full((len(x[p]),), sigma), self.cond[p]) for p in parts])

    def sensitivity(
        self, groups: Mapping[str, list[str]], choices: Sequence[int], quantize: Quantize, path: Path
    ) -> dict[str, dict[int, float]]:
        """Damage of each group alone at each number of bits; every number is kept in `path` at once, and not measured again."""
        found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        layers = self.layers
        todo = [(group, bits) for group in groups for bits in choices if str(bits) not in found.get(group, {})]
        for group, bits in track(todo, "sensitivity", total=len(todo)):
            with swapped([layers[name] for name in groups[group]]):
                for name in groups[group]:
                    layer = layers[name]
                    layer.weight.data = dequantize(quantize(name, layer, bits))
                found.setdefault(group, {})[str(bits)] = self.damage()
            path.with_suffix(".tmp").write_text(json.dumps(found))
            path.with_suffix(".tmp").replace(path)
        return {group: {bits: found[group][str(bits)] for bits in choices} for group in groups}

    def moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        """sum x x^T [K, K] of the inputs of each layer over all nodes, of the student as it is now."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                found[name] = found.get(name, 0) + x.T @ x

            return hook

        layers = self.layers
        handles = [layers[name].register_forward_pre_hook(keep(name)) for name in names]
        try:
            self.rollouts()
        finally:
            for handle in handles:
                handle.remove()
        return found


@contextmanager
def swapped(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Weights that are replaced inside come back afterwards."""
    own = [layer.weight.data for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.data = weight


def quantize_in_order(
    layers: Mapping[str, nn.Linear],
    one: Callable[[str, nn.Linear, dict[str, Tensor]], QuantizedLinear],
    calibration: Calibration | None,
    work: Path,
) -> dict[str, QuantizedLinear]:
    """Codes of every layer, which ends with the weights of its codes.

    Block after block, each calibrated behind those that are quantized already; finished blocks are kept in `work`.
    """
    units: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        units[unit_of(name)].append(name)
    done: dict[str, QuantizedLinear] = {}
    for number, names in enumerate(track(units.values(), "quantize", total=len(units))):
        path = work / f"unit-{number:03d}.pt"
        if calibration and path.exists():
            saved: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
            made = {name: QuantizedLinear(**fields) for name, fields in saved.items()}
        else:
            moments = calibration.moments(names) if calibration else {}
            made = {name: one(name, layers[name], moments) for name in names}
            if calibration:
                save_state({name: vars(q) for name, q in made.items()}, path)
        for name, q in made.items():
            layers[name].weight.data.copy_(dequantize(q))
        done |= made
    return done
