"""Networks as exportable components, and the description by which a runtime without torch draws with them.

A description (`Manifest.extra["graph"]`) is plain data, so that `device.sampler` and flashgen.js need to know no family:

    encoders       one entry per text encoder, in order:
                     component, tokenizer (folders); length, pad_id (tokens);
                     ids (input name), mask (input name of the attention mask, or null);
                     outputs {VALUE: OUTPUT NAME}: values that expressions below name; width, for memory estimates
                     mask_value (VALUE that holds the mask as float32 [B, L], or null)
    conditioning   {TRANSFORMER INPUT: EXPRESSION}, rows of the batch first
    transformer    latents, timestep, output (names); timestep_scale and timestep_offset: timestep = scale * sigma + offset;
                     output_scale: v = output_scale * output; patch: 0, or the side of the squares that are packed into tokens
                     [B, (h/p)(w/p), C p p] (channel-major within a token); tokens, width: for memory estimates
    vae            factor, scaling_factor, shift_factor: vae_decoder takes z / scaling_factor + shift_factor as latent_sample and
                     gives sample; vae_encoder, if exported, takes sample and gives latent_parameters (mean, log variance);
                     channels (of the widest full-size layer), attention: for memory estimates
    latent_shape   [C, h, w]

An expression is a VALUE, or one of these, nested at most 8 deep (`device.graph` checks it)

    {"concat": [EXPRESSION, ...], "axis": A}     along axis A >= 1 (axis 0 is the batch) or -1, the last
    {"pad": EXPRESSION, "to": N}                 zeros behind the last axis up to N
    {"zeros": [L, D]}                            zeros [B, L, D]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Call(nn.Module):
    """A network under the argument names of its ONNX graph; `net` prefixes the names of its parameters there."""

    def __init__(self, net: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.net = net
        self.call = call

    def forward(self, *args: Tensor) -> Any:
        """The network's output tensor, or a tuple of them."""
        return self.call(self.net, *args)


@dataclass(frozen=True)
class Component:
    """One network to export.

    `inputs` are examples [rows, ...]; `dynamic` names the axes beside the batch that are dynamic too: {input: {axis: name}}.
    `checks` are further input sets that the exported graph is compared on.
    """

    name: str
    module: Call
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    checks: tuple[dict[str, Tensor], ...] = ()

    @torch.no_grad()
    def reference(self, inputs: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """torch's outputs for `inputs` (default: the examples), in the order of `outputs`."""
        out = self.module(*(self.inputs if inputs is None else inputs).values())
        return [out] if isinstance(out, Tensor) else list(out)
