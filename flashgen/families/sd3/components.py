"""SD3's networks as ONNX components, with the names that optimum's ORTDiffusionPipeline expects.

    transformer      hidden_states, encoder_hidden_states, pooled_projections, timestep -> out_hidden_states
    text_encoder(_2) input_ids -> text_embeds, last_hidden_state, hidden_states.0 ... hidden_states.(layers-1)
    text_encoder_3   input_ids -> last_hidden_state
    vae_decoder      latent_sample -> sample          (latents already divided by scaling_factor, plus shift_factor)
    vae_encoder      sample -> latent_parameters      (mean and log variance along axis 1; on request)

The batch is dynamic, and so are the transformer's number of text tokens and the decoder's height and width, because it decodes tiles;
the transformer and the VAE's encoder know one size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.families.base import predict
from flashgen.families.graphs import Call, Component
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts

EXAMPLES = ["two red circles on a white background", "a photo of a cat", "", "a blue square left of a green cross"]  # any texts that differ
DECODED = 64  # largest side of the decoder's example, in latents
SMALL_PX = 256 * 256  # pictures up to this size are checked with three rows, larger ones with one
CHECKED_NODES = 8  # noise levels beside the examples' at which the exported transformer is compared, at most


@torch.no_grad()
def components(pipe: Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
    """Every network that the device needs, with example inputs as they occur when sampling."""
    size = sampler.size_px
    rows = 3 if size.height * size.width <= SMALL_PX else 1  # several rows check the batch axis, large pictures cannot afford them
    prompts = EXAMPLES[:rows]
    inputs = pipe.family.tokenize(pipe, prompts, sampler)
    for name in ("text_encoder", "text_encoder_2"):
        yield _clip(name, pipe[name], inputs[name]["input_ids"])
    if "text_encoder_3" in inputs and sampler.has_all_encoders:
        t5 = Call(pipe["text_encoder_3"], lambda net, ids: net(ids)[0])
        yield Component("text_encoder_3", t5, inputs["text_encoder_3"], ("last_hidden_state",))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *pipe.family.latent_shape(pipe.configs, size), generator=generator)
    yield _transformer(pipe, sampler, prompts, latents)
    vae = pipe.vae.config
    decode = Call(pipe.vae, lambda net, z: net.decode(z.to(net.dtype), return_dict=False)[0].to(z.dtype))
    part = latents[..., :DECODED, :DECODED]  # of a large picture: any height and width will do
    scaled = {"latent_sample": part / vae.scaling_factor + vae.shift_factor}
    yield Component("vae_decoder", decode, scaled, ("sample",), {"latent_sample": {2: "height", 3: "width"}})
    if vae_encoder:
        pictures = {"sample": 2 * torch.rand(rows, 3, size.height, size.width, generator=generator) - 1}
        own = copy.deepcopy(pipe.vae)  # the decoder's weights go
        encode_picture = Call(own, lambda net, x: net.encode(x.to(net.dtype)).latent_dist.parameters.to(x.dtype))
        yield Component("vae_encoder", encode_picture, pictures, ("latent_parameters",))


def _transformer(pipe: Pipeline, sampler: Sampler, prompts: list[str], latents: Tensor) -> Component:
    """The transformer. Its examples, together, are at the first nodes of the sampler; its checks, one picture each, are at the others.

    Of many nodes, `CHECKED_NODES` evenly spread ones are checked, the last one included.
    """
    cond, nodes = encode_prompts(pipe, prompts, sampler), sampler.sigmas[:-1]

    def inputs(rows: slice, sigmas: list[float]) -> dict[str, Tensor]:
        return pipe.family.transformer_inputs(latents[rows], torch.tensor(sigmas), cond[rows])

    examples = inputs(slice(None), (nodes * len(latents))[: len(latents)])
    names = list(examples)
    others = nodes[len(latents) :]
    step = max(1, -(-len(others) // CHECKED_NODES))
    checks = tuple(inputs(slice(0, 1), [sigma]) for sigma in reversed(others[::-step]))
    call = Call(pipe.transformer, lambda net, *args: predict(net, dict(zip(names, args, strict=True))))
    return Component("transformer", call, examples, ("out_hidden_states",), {"encoder_hidden_states": {1: "tokens"}}, checks)


def _clip(name: str, net: nn.Module, ids: Tensor) -> Component:
    def call(net: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        out = net(ids, output_hidden_states=True)
        return (out.text_embeds, out.last_hidden_state, *out.hidden_states[:-1])

    layers = int(net.config.num_hidden_layers)  # type: ignore[arg-type, union-attr]  # torch types attributes as Tensor | Module
    hidden = tuple(f"hidden_states.{i}" for i in range(layers))
    return Component(name, Call(net, call), {"input_ids": ids}, ("text_embeds", "last_hidden_state", *hidden))


def crop_positions(transformer: nn.Module, height: int, width: int) -> None:
    """Replace the position table (384 x 384 for SD3.5-Medium, 906 MB) by the centre that latents of this size use. In place."""
    embed: Any = transformer.pos_embed
    embed.pos_embed = embed.cropped_pos_embed(height, width).clone()
    embed.cropped_pos_embed = lambda height, width: embed.pos_embed
