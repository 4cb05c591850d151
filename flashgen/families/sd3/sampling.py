"""How SD3 teachers are sampled by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashgen.artifact.manifest import Sampler
from flashgen.errors import ArtifactError
from flashgen.families.base import Family
from flashgen.families.configs import configs_in, read_config
from flashgen.families.sd3.specs import Spec
from flashgen.flow.grid import shifted_grid
from flashgen.pixels import Size

SHIFT = 3.0  # timestep shift of SD3's scheduler
STEPS, GUIDANCE = 28, 4.5  # SD3.5-Medium's and Large's published settings
T5_TOKENS = 256  # diffusers' default max_sequence_length


def teacher_sampler(clip_tokens: int, t5_tokens: int, size: Size, *, guidance: float = GUIDANCE, shift: float = SHIFT) -> Sampler:
    """Guided sampling in 28 Euler steps on the shifted grid."""
    return Sampler(
        sigmas=shifted_grid(STEPS, shift),
        shift=shift,
        guidance=guidance,
        tokens={"clip": clip_tokens, "t5": t5_tokens},
        size_px=size,
        trained_steps=[],
    )


def random_sampler(spec: Spec) -> Sampler:
    """The sampler of a fabricated teacher."""
    side = int(spec.transformer["sample_size"]) * 2 ** (len(spec.vae["block_out_channels"]) - 1)
    return teacher_sampler(spec.clip_tokens, spec.t5_tokens, Size(side, side))


def import_sampler(family: Family, folder: Path) -> Sampler:
    """The sampler of an imported teacher: shift and token lengths from its files. Raises ArtifactError for files that cannot be read."""
    side = int(read_config(folder, "transformer")["sample_size"]) * family.vae_factor(configs_in(folder))
    shift = _setting(folder / "scheduler" / "scheduler_config.json", "shift", SHIFT)
    clip = _setting(folder / "tokenizer" / "tokenizer_config.json", "model_max_length", 77)
    t5_file = folder / "tokenizer_3" / "tokenizer_config.json"
    t5 = min(_setting(t5_file, "model_max_length", T5_TOKENS), T5_TOKENS) if t5_file.exists() else T5_TOKENS
    sampler = teacher_sampler(int(clip), int(t5), Size(side, side), shift=float(shift))
    index = json.loads((folder / "model_index.json").read_text())
    has_t5 = (index.get("text_encoder_3") or [None])[0] is not None
    return sampler if has_t5 else sampler.model_copy(update={"encoder": "zeros"})


def _setting(file: Path, key: str, default: float) -> Any:
    try:
        return json.loads(file.read_text()).get(key, default)
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); take the pipeline from its source again") from error
