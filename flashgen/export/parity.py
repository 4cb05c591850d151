"""Parity of exported graphs with torch: PSNR of every output, with a floor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flashgen.errors import NumericsError
from flashgen.families.graphs import Component

EQUAL_DB = 200.0


@dataclass(frozen=True)
class Reference:
    """torch's outputs for the examples and for every further input set of a component.

    `loudest` is the layer with the largest absolute output, and that number (infinity for NaN).
    """

    outputs: list[list[NDArray[np.float32]]]
    loudest: tuple[str, float]


def reference(component: Component) -> Reference:
    """Run a component in torch, one input set at a time, while its module still has its weights."""
    with largest_output(component.module.net) as largest:
        outputs = [[value.numpy() for value in component.reference(inputs)] for inputs in (component.inputs, *component.checks)]
    return Reference(outputs, max(largest.items(), key=lambda item: item[1]))


def check(component: Component, expected: Reference, model: Path, floor_db: float, overflows: bool = True) -> float:
    """PSNR of the worst output of the graph `model` over all input sets; `overflows` as in `Opening`.

    Raises NumericsError below `floor_db` and for NaN.
    """
    from flashgen.device.engine import Opening, open_session

    session = open_session(model, Opening(overflows=overflows))
    sets, worst = (component.inputs, *component.checks), EQUAL_DB
    for number, (inputs, wanted) in enumerate(zip(sets, expected.outputs, strict=True), 1):
        outputs = session.run(list(component.outputs), {name: value.numpy() for name, value in inputs.items()})
        psnr = {name: psnr_db(r, np.asarray(o)) for name, r, o in zip(component.outputs, wanted, outputs, strict=True)}
        name = min(psnr, key=lambda name: (not np.isnan(psnr[name]), psnr[name]))
        if not psnr[name] >= floor_db:
            raise NumericsError(
                f"{component.name}: output {name} is at {psnr[name]:.1f} dB PSNR against torch on input set {number} of {len(sets)}, "
                f"the floor is {floor_db:g} dB; nothing was written. Accept it with --set export.psnr_floor_db=... "
                "(psnr_floor_int8_db at accuracy level 4), or report it as a bug."
            )
        worst = min(worst, psnr[name])
    return worst


def psnr_db(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    """20 log10(range of `expected` / RMS error); 200 for equal arrays, NaN when a number is not finite."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    error = float(np.sqrt(np.mean((expected - actual) ** 2)))
    spread = float(expected.max() - expected.min()) or 1.0
    return float(np.minimum(EQUAL_DB, 20 * np.log10(spread / error))) if error else EQUAL_DB  # np.minimum keeps NaN


@contextmanager
def largest_output(network: nn.Module) -> Iterator[dict[str, float]]:
    """Inside, record the largest absolute output of each layer of `network` under the layer's name; infinity for NaN."""
    largest: dict[str, float] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            largest[name] = max(largest.get(name, 0.0), float(output.abs().max().nan_to_num(nan=torch.inf)))

    layers = [(name, layer) for name, layer in network.named_modules() if not any(layer.children())]
    handles = [layer.register_forward_hook(lambda _, __, output, name=name: record(name, output)) for name, layer in layers]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def require_half_range(part: str, expected: Reference) -> None:
    """Raise NumericsError if a layer of the component `part` puts out numbers that fp16 does not hold."""
    layer, value = expected.loudest
    if not value < torch.finfo(torch.float16).max:
        raise NumericsError(
            f"{part}: its layer {layer} puts out {value:.4g}, and fp16 ends at {torch.finfo(torch.float16).max:.0f}; "
            "export it without export.precision=float16"
        )


def why_no_half(loudest: Mapping[str, tuple[str, float]]) -> str:
    """One sentence on why an artifact has no graph that computes in fp16; `loudest` is `Reference.loudest` by component."""
    part = max(loudest, key=lambda name: loudest[name][1])
    layer, value = loudest[part]
    limit = float(torch.finfo(torch.float16).max)
    largest = f"{part}'s {layer} puts out {value:.4g} on the prompts and noise levels of the parity check, and fp16 ends at {limit:.0f}"
    if not value < limit:
        return f"no fp16 graph: {largest}"
    return f"no fp16 graph: the engines here compute on the CPU, which multiplies fp16 more slowly than fp32; its range would do: {largest}"
