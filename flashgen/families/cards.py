"""A family's part of the model card of a version."""

from __future__ import annotations

from typing import NamedTuple


class Usage(NamedTuple):
    """How programs other than flashgen draw as a version does."""

    diffusers: str  # a Python program that draws from the folder "."
    lora: str  # a Python program that draws with the base pipeline and the LoRA file in the folder "lora"
    comfyui: str  # settings, separated by commas


class Published(NamedTuple):
    """Weights that their makers have published, and the licence of everything that is made from them."""

    base_model: str  # hub id
    license_id: str  # `license_name` in the hub's front matter
    license_name: str
    license_link: str
    notice: str  # text that copies must carry
