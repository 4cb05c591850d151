"""The networks of an SD3-class pipeline as ONNX components, with the names that optimum's ORTDiffusionPipeline expects.

    transformer      hidden_states, encoder_hidden_states, pooled_projections, timestep -> out_hidden_states
    text_encoder(_2) input_ids -> text_embeds, last_hidden_state, hidden_states.0 ... hidden_states.(layers-1)
    text_encoder_3   input_ids -> last_hidden_state
    vae_decoder      latent_sample -> sample          (latents already divided by scaling_factor, plus shift_factor)
    vae_encoder      sample -> latent_parameters      (mean and log variance along axis 1; on request)

The batch is dynamic, and so are the transformer's number of text tokens and the decoder's height and width, which decodes tiles;
the transformer and the VAE's encoder know one size.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.models.sample import latent_shape
from flashgen.models.text import encode, tokenize

# Any text will do: the examples only need to differ from each other.
EXAMPLES = ["two red circles on a white background", "a photo of a cat", "", "a blue square left of a green cross"]
DECODED = 64  # latents a side of the decoder's example, at most
TRACE_ROWS = 2  # torch.export takes 0 and 1 for constants


class Call(nn.Module):
    """A network under the argument names of its ONNX graph; `net` prefixes its parameters there."""

    def __init__(self, net: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.net = net
        self.call = call

    def forward(self, *args: Tensor) -> Any:
        return self.call(self.net, *args)


@dataclass(frozen=True)
class Component:
    """`inputs` are examples [rows, ...]; `dynamic` names the axes beside the batch that are dynamic too: {input: {axis: name}}."""

    name: str
    module: Call
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @torch.no_grad()
    def reference(self) -> list[Tensor]:
        """What torch computes for `inputs`, in the order of `outputs`."""
        out = self.module(*self.inputs.values())
        return [out] if isinstance(out, Tensor) else list(out)


@torch.no_grad()
def components(pipe: StableDiffusion3Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
    """Every network that the device needs, with example inputs as they occur when sampling."""
    rows = 3 if sampler.size_px <= 256 else 1  # more rows check the batch axis better, large pictures cannot afford them
    prompts = EXAMPLES[:rows]
    ids = tokenize(pipe, prompts, sampler.t5_tokens)
    yield _clip("text_encoder", pipe.text_encoder, ids.clip_l)
    yield _clip("text_encoder_2", pipe.text_encoder_2, ids.clip_g)
    if ids.t5 is not None and sampler.has_t5:
        yield Component(
            "text_encoder_3", Call(pipe.text_encoder_3, lambda net, ids: net(ids)[0]), {"input_ids": ids.t5}, ("last_hidden_state",)
        )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *latent_shape(pipe, sampler.size_px), generator=generator)
    condition = encode(pipe, ids, sampler.t5_tokens)
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": condition.embeds,
        "pooled_projections": condition.pooled,
        "timestep": 1000 * torch.tensor((sampler.sigmas * rows)[:rows]),
    }
    tokens = {"encoder_hidden_states": {1: "tokens"}}
    yield Component("transformer", Call(pipe.transformer, _velocity), inputs, ("out_hidden_states",), tokens)
    vae = pipe.vae.config
    decode = Call(pipe.vae, lambda net, z: net.decode(z, return_dict=False)[0])
    part = latents[..., :DECODED, :DECODED]  # of a large picture: any height and width will do
    scaled = {"latent_sample": part / vae.scaling_factor + vae.shift_factor}
    yield Component("vae_decoder", decode, scaled, ("sample",), {"latent_sample": {2: "height", 3: "width"}})
    if vae_encoder:
        pictures = {"sample": 2 * torch.rand(rows, 3, sampler.size_px, sampler.size_px, generator=generator) - 1}
        own = copy.deepcopy(pipe.vae)  # the decoder's module loses its weights as it is written
        encode_picture = Call(own, lambda net, x: net.encode(x).latent_dist.parameters)
        yield Component("vae_encoder", encode_picture, pictures, ("latent_parameters",))


def _clip(name: str, net: nn.Module, ids: Tensor) -> Component:
    def call(net: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        out = net(ids, output_hidden_states=True)
        return (out.text_embeds, out.last_hidden_state, *out.hidden_states[:-1])

    layers = int(net.config.num_hidden_layers)  # type: ignore[arg-type, union-attr]
    hidden = tuple(f"hidden_states.{i}" for i in range(layers))
    return Component(name, Call(net, call), {"input_ids": ids}, ("text_embeds", "last_hidden_state", *hidden))


def _velocity(net: nn.Module, x: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
    out: Tensor = net(x, embeds, pooled, timestep, return_dict=False)[0]
    return out


def crop_positions(transformer: nn.Module, size_latent: int) -> None:
    """Replace the position table (384 x 384 for SD3.5-Medium, 906 MB) by the centre that pictures of this size use. In place."""
    embed: Any = transformer.pos_embed
    embed.pos_embed = embed.cropped_pos_embed(size_latent, size_latent).clone()
    embed.pos_embed_max_size = size_latent // embed.patch_size


def trace(component: Component) -> ir.Model:
    """The component as an unoptimized ONNX graph, in which every Linear still shows its parameters by name (`net.` + name).

    Its module may be on `meta`: shapes are all that is looked at.
    """
    device = next(component.module.parameters()).device
    batch = torch.export.Dim("batch")
    args, dynamic = [], []
    for name, value in component.inputs.items():
        args.append(value[:1].expand(TRACE_ROWS, *value.shape[1:]).contiguous().to(device))
        dynamic.append({0: batch} | {axis: torch.export.Dim(label) for axis, label in component.dynamic.get(name, {}).items()})
    exporter_log = logging.getLogger("torch.onnx._internal.exporter")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                component.module.eval(),
                tuple(args),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                dynamic_shapes=((*dynamic,),),
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    return program.model
