"""The tiny decoder in torch: new, read from a folder, or as an exportable component (`families.tiny_decoder` says what it is).

The encoder that diffusers' AutoencoderTiny asks for has one channel and weights of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgen.artifact.files import SOURCE
from flashgen.artifact.finite import check_finite
from flashgen.errors import ArtifactError
from flashgen.families.configs import read_config
from flashgen.families.graphs import Call, Component
from flashgen.families.tiny_decoder import CONFIG, WEIGHTS, TinyConfig, levels
from flashgen.models.stream import header, tensor
from flashgen.randomness import seeded

KIND = "AutoencoderTiny"


def new_tiny_decoder(channels: int, factor: int, width: int, blocks: int, seed: int) -> Any:
    """AutoencoderTiny with random weights: `width` channels, `blocks` blocks at each resolution but the last, which has one."""
    count = levels(factor)
    assert count
    with seeded(seed):
        return _network(channels, width, [blocks] * (count - 1) + [1])


def load_tiny_decoder(folder: Path, channels: int, factor: int) -> Any:
    """The AutoencoderTiny in `folder`, in fp32, for latents of `channels` channels and `factor` pixels per latent. Its encoder is not read.

    Raises ArtifactError, naming the file, for a config or weights of another model, NumericsError for weights that are not finite.
    """
    config, file = read_config(folder, ".", TinyConfig), folder / WEIGHTS
    widths, blocks = config["decoder_block_out_channels"], config["num_decoder_blocks"]
    if (kind := config.get("_class_name", KIND)) != KIND:
        raise ArtifactError(f"{folder / CONFIG} is of {kind!r}, a tiny decoder is an {KIND}; {SOURCE}")
    has, needs = (config["latent_channels"], 2 ** (len(widths) - 1)), (channels, factor)
    if has != needs:
        words = " and ".join(f"{value} {name}" for value, name in zip(has, ("latent channels", "pixels per latent"), strict=True))
        raise ArtifactError(f"{folder / CONFIG}: {words}, the VAE has {channels} and {factor}; take a tiny decoder for this VAE")
    entries = header(file)[0]
    with torch.device("meta"):
        parameters = dict(_network(channels, widths[0], blocks).decoder.named_parameters(prefix="decoder"))
    for name, parameter in parameters.items():
        entry = entries.get(name, {"shape": None, "dtype": ""})
        if entry["shape"] != list(parameter.shape) or not entry["dtype"].startswith(("F", "BF")):
            raise ArtifactError(f"{file} has no weights {name} {list(parameter.shape)}, which its config asks for; {SOURCE}")
    check_finite(file)
    network = _network(channels, widths[0], blocks)
    network.load_state_dict({name: tensor(file, name).float() for name in parameters}, strict=False)
    return network


def _network(channels: int, width: int, blocks: list[int]) -> Any:
    from diffusers import AutoencoderTiny

    network: Any = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(1,),
        num_encoder_blocks=(0,),
        decoder_block_out_channels=(width,) * len(blocks),
        num_decoder_blocks=tuple(blocks),
    )
    for parameter in network.eval().encoder.parameters():
        torch.nn.init.zeros_(parameter)
    return network


def tiny_component(part: Component, network: Any, vae: Mapping[str, Any]) -> Component:
    """The exportable component `part`, vae_decoder, with `network` in the VAE's place; inputs and outputs stay as they are.

    `vae` is that entry of the family's description: the graph takes z / scaling_factor + shift_factor. So does whoever reads the config.
    """
    scaling, shift = float(vae["scaling_factor"]), float(vae["shift_factor"])
    network.register_to_config(scaling_factor=scaling, shift_factor=shift)

    def decode(net: Any, z: Tensor) -> Tensor:
        pictures: Tensor = net.decode(((z - shift) * scaling).to(net.dtype), return_dict=False)[0]
        return pictures.to(z.dtype)

    return replace(part, module=Call(network, decode))
