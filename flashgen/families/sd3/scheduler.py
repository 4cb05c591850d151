"""Settings of diffusers' scheduler with which the plain call, `num_inference_steps` alone, walks a student's noise levels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import copysign, sqrt
from pathlib import Path
from typing import Any

from flashgen.artifact.files import read_json

TOLERANCE = 1e-6  # of a sigma; the scheduler computes in fp32


def set_scheduler(folder: Path, sigmas: Sequence[float]) -> bool:
    """Set the scheduler of the pipeline in `folder` so that as many steps as `sigmas` has walk `sigmas`; False if no setting does.

    The file is written anew, because it may be a link into another version.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return False
    config = read_json(file)
    if not walks(config, sigmas):
        config |= plain_settings(sigmas, int(config.get("num_train_timesteps", 1000)))
        if not walks(config, sigmas):
            return False
        file.unlink()
        file.write_text(json.dumps(config, indent=2) + "\n")
    return True


def plain_settings(sigmas: Sequence[float], train_timesteps: int) -> dict[str, Any]:
    """Shift and last sigma of the scheduler that fit `sigmas`, if any do (our derivation).

    The plain call takes u_i = 1 - i (1 - m) / (n - 1), where m = k / (T - 1 + k) is the smallest of the T shifted sigmas, shifts each
    u_i by k and stretches all so that the last is `shift_terminal`. With d = (1 - m) / (n - 1) and r = k / ((k - 1) d) this gives
    1 - sigma_i in proportion to i / (r - i). A grid of `shifted_grid` has this form. r follows from two of its sigmas, and k from r, as
    the root of k^2 + (T - 1 - a) k + a = 0 that is of the order of 1, with a = r (T - 1) / (n - 1).
    """
    n, shift = len(sigmas) - 1, 1.0
    if n > 2 and (ratio := (1 - sigmas[1]) / (1 - sigmas[2])) != 0.5:
        a = (2 - 2 * ratio) / (1 - 2 * ratio) * (train_timesteps - 1) / (n - 1)
        b = a - (train_timesteps - 1)
        shift = 2 * a / (b + copysign(sqrt(max(b * b - 4 * a, 0.0)), b))
    return {"shift": shift, "shift_terminal": sigmas[-2] if n > 1 else None, "use_dynamic_shifting": False}


def walks(config: Mapping[str, Any], sigmas: Sequence[float]) -> bool:
    """Return True if diffusers' scheduler with `config` walks `sigmas` when it is told only their number."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if (
        config.get("_class_name") != FlowMatchEulerDiscreteScheduler.__name__
        or config.get("use_dynamic_shifting")
        or config.get("shift", 1.0) <= 0
    ):
        return False
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(len(sigmas) - 1)
    return all(abs(a - b) <= TOLERANCE for a, b in zip(scheduler.sigmas.tolist(), sigmas, strict=True))
