"""Does the exported graph compute what torch computes? A number with a floor, not an eye."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flashgen.errors import NumericsError
from flashgen.export.components import Component


def psnr_db(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """20 log10(range of the reference / RMS error); 200 for equal arrays, NaN when something is not finite."""
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    error = float(np.sqrt(np.mean((reference - other) ** 2)))
    spread = float(reference.max() - reference.min()) or 1.0
    return float(np.minimum(200.0, 20 * np.log10(spread / error))) if error else 200.0  # np.minimum keeps NaN


def check(component: Component, reference: list[NDArray[np.float32]], model: Path, floor_db: float) -> float:
    """PSNR of the worst output of `model` against torch. Raises NumericsError below `floor_db` and for NaN."""
    from flashgen.device.engine import open_session

    session = open_session(model)
    got = session.run(list(component.outputs), {k: v.numpy() for k, v in component.inputs.items()})
    found = {name: psnr_db(r, np.asarray(g)) for name, r, g in zip(component.outputs, reference, got, strict=True)}
    worst = min(found, key=lambda name: (not np.isnan(found[name]), found[name]))
    if not found[worst] >= floor_db:
        raise NumericsError(
            f"{component.name}: output {worst} is at {found[worst]:.1f} dB PSNR against torch, the floor is {floor_db:g} dB; nothing was "
            "written. Accept it with --set export.psnr_floor_db=... (psnr_floor_int8_db at accuracy level 4), or report it as a bug."
        )
    return found[worst]


@contextmanager
def largest_output(network: nn.Module) -> Iterator[dict[str, float]]:
    """Inside, the greatest absolute value that each layer of `network` puts out is kept under the layer's name; infinity for NaN."""
    found: dict[str, float] = {}

    def look(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            found[name] = max(found.get(name, 0.0), float(output.abs().max().nan_to_num(nan=torch.inf)))

    layers = [(name, layer) for name, layer in network.named_modules() if not any(layer.children())]
    handles = [layer.register_forward_hook(lambda _, __, output, name=name: look(name, output)) for name, layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def why_no_half(largest: dict[str, tuple[str, float]]) -> str:
    """One sentence on why an artifact has no graph that computes in fp16, from the layer of each component that puts out most."""
    part = max(largest, key=lambda name: largest[name][1])
    layer, value = largest[part]
    limit = float(torch.finfo(torch.float16).max)
    seen = f"{part}'s {layer} puts out {value:.4g} on the prompts and noise levels of the parity check, and fp16 ends at {limit:.0f}"
    if not value < limit:
        return f"no fp16 graph: {seen}"
    return f"no fp16 graph: the engines here compute on the CPU, which multiplies fp16 more slowly than fp32; its range would do: {seen}"
