"""Does the exported graph compute what torch computes? A number with a floor, not an eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
