"""How SD3 teachers are sampled by default."""

from __future__ import annotations

from pathlib import Path

from flashgen.artifact.files import SOURCE, read_json
from flashgen.artifact.manifest import MAX_TOKENS, Sampler
from flashgen.errors import ArtifactError
from flashgen.families.base import Family
from flashgen.families.configs import configs_in
from flashgen.families.sd3.specs import Spec
from flashgen.flow.grid import shifted_grid
from flashgen.pixels import Size

SHIFT = 3.0  # timestep shift of SD3's scheduler
STEPS, GUIDANCE = 28, 4.5  # SD3.5-Medium's and Large's published settings
FOLLOWED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "invert_sigmas": False,
    "stochastic_sampling": False,
}  # fmt: skip  # settings of diffusers' scheduler; a file that leaves one out has it as here
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
    """The sampler of an imported teacher: shift and token lengths from its files. Raises ArtifactError for files that it cannot follow."""
    configs = configs_in(folder, family)
    side = int(configs("transformer")["sample_size"]) * family.vae_factor(configs)
    has_t5 = read_json(folder / "model_index.json").get("text_encoder_3", [None])[0] is not None
    clip = min(
        _length(folder / "tokenizer"), *(int(configs(name)["max_position_embeddings"]) for name in ("text_encoder", "text_encoder_2"))
    )
    t5 = min(_length(folder / "tokenizer_3"), T5_TOKENS) if has_t5 else T5_TOKENS
    sampler = teacher_sampler(clip, t5, Size(side, side), shift=_shift(folder / "scheduler" / "scheduler_config.json"))
    return sampler if has_t5 else sampler.model_copy(update={"encoder": "zeros"})


def _length(tokenizer: Path) -> int:
    """The most tokens that a tokenizer's config allows; without a limit, more than any text encoder has."""
    file = tokenizer / "tokenizer_config.json"
    length = read_json(file).get("model_max_length") if file.exists() else None
    if length is None:
        return MAX_TOKENS
    if type(length) not in (int, float) or length < 2:
        raise ArtifactError(f"{file}: model_max_length is {length!r}, not a number of tokens; {SOURCE}")
    return int(min(length, MAX_TOKENS))


def _shift(file: Path) -> float:
    """The timestep shift of a scheduler that walks the shifted grid and nothing else."""
    config = read_json(file)
    for key, followed in FOLLOWED.items():
        if config.get(key) not in (None, followed):
            raise ArtifactError(f"{file}: {key} is {config[key]!r}; flashgen follows {followed!r} only, so its pictures would be others")
    shift = config.get("shift", 1.0)  # diffusers' default
    if type(shift) not in (int, float) or not 0.01 <= shift <= 100:
        raise ArtifactError(f"{file}: shift is {shift!r}, not a number from 0.01 to 100; {SOURCE}")
    return float(shift)
