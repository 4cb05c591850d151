"""A student's adapter as the LoRA file that diffusers, ComfyUI and others read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from flashgen import __version__
from flashgen.models.save import to_half
from flashgen.training.roles import Role
from flashgen.training.shards import full

NAME = "pytorch_lora_weights.safetensors"  # where `load_lora_weights(FOLDER)` looks


def save_lora(folder: Path, role: Role, prefix: str, sigmas: Sequence[float], base_digest: str) -> None:
    """Write the adapter of `role` in fp16, with names that start with `prefix`: `PREFIX.MODULE.lora_A.weight` and `lora_B`.

    The file's alpha is its rank, because programs disagree on where they look for an alpha: B is multiplied by the trained alpha / rank.
    `base_digest` is of the artifact under the adapter. Raises NumericsError for values that fp16 cannot hold.
    """
    config: Any = role.network.peft_config[role.adapter]  # type: ignore[index]
    tensors = {}
    for name, value in role.state_dict().items():
        scaled = full(value) * (config.lora_alpha / config.r if ".lora_B." in name else 1)
        tensors[f"{prefix}.{name.replace(f'.{role.adapter}.', '.')}"] = to_half(scaled, f"lora: {name}").cpu().contiguous()
    facts = {"format": "pt", "rank": str(config.r), "alpha": str(config.r), "sigmas": json.dumps(list(sigmas))}
    folder.mkdir()
    save_file(tensors, folder / NAME, metadata=facts | {"base_digest": base_digest, "flashgen_version": __version__})
