"""How teachers of the packed family are sampled by default."""

from __future__ import annotations

import json
from pathlib import Path

from flashgen.artifact.manifest import Sampler
from flashgen.flow.grid import shifted_grid
from flashgen.pixels import Size

STEPS, GUIDANCE, SHIFT = 12, 2.0, 2.0
TOKENS = 12
SIDE_PX = 64


def teacher_sampler(shift: float = SHIFT, tokens: int = TOKENS) -> Sampler:
    """Guided sampling in 12 Euler steps on the shifted grid."""
    grid = shifted_grid(STEPS, shift)
    return Sampler(
        sigmas=grid, shift=shift, guidance=GUIDANCE, tokens={"bert": tokens}, size_px=Size(SIDE_PX, SIDE_PX), trained_steps=[]
    )  # fmt: skip


def import_sampler(folder: Path) -> Sampler:
    """The sampler of an imported teacher: the shift from its scheduler, the number of tokens from its tokenizer."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    return teacher_sampler(float(scheduler["shift"]), int(tokenizer["model_max_length"]))
