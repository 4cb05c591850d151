"""The packed family's networks as ONNX components.

    language_model   input_ids, attention_mask -> last_hidden_state
    transformer      hidden_states, encoder_hidden_states, encoder_attention_mask, timestep -> sample
    vae_decoder      latent_sample -> sample
    vae_encoder      sample -> latent_parameters        (on request)

The places of the image tokens are constants of the graph, which knows one size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.families.base import predict
from flashgen.families.graphs import Call, Component
from flashgen.models.pipeline import Pipeline
from flashgen.models.prompts import encode_prompts

from . import ENCODER, PATCH
from .packing import grid

EXAMPLES = ["a red circle on a white square", "two birds", ""]


@torch.no_grad()
def components(pipe: Pipeline, sampler: Sampler, vae_encoder: bool = False) -> Iterator[Component]:
    """Every network that the device needs, with example inputs as they occur when sampling."""
    tokens = pipe.family.tokenize(pipe, EXAMPLES, sampler)[ENCODER]
    yield Component(
        ENCODER, Call(pipe[ENCODER], lambda net, ids, mask: net(ids, attention_mask=mask).last_hidden_state), tokens, ("last_hidden_state",)
    )
    generator, shape = torch.Generator().manual_seed(0), pipe.family.latent_shape(pipe.configs, sampler.size_px)
    latents = torch.randn(len(EXAMPLES), *shape, generator=generator)
    yield _transformer(pipe, sampler, latents)
    vae = pipe.vae.config
    decode = Call(pipe.vae, lambda net, z: net.decode(z, return_dict=False)[0])
    scaled = {"latent_sample": latents / vae.scaling_factor + vae.shift_factor}
    yield Component("vae_decoder", decode, scaled, ("sample",), {"latent_sample": {2: "height", 3: "width"}})
    if vae_encoder:
        pictures = {"sample": 2 * torch.rand(len(EXAMPLES), 3, *sampler.size_px, generator=generator) - 1}
        encode = Call(copy.deepcopy(pipe.vae), lambda net, x: net.encode(x).latent_dist.parameters)
        yield Component("vae_encoder", encode, pictures, ("latent_parameters",))


def _transformer(pipe: Pipeline, sampler: Sampler, latents: Tensor) -> Component:
    cond, nodes = encode_prompts(pipe, EXAMPLES, sampler), sampler.sigmas[:-1]
    rows, columns = (side // PATCH for side in latents.shape[2:])

    def inputs(prompts: slice, sigmas: list[float]) -> dict[str, Tensor]:
        found = pipe.family.transformer_inputs(latents[prompts], torch.tensor(sigmas), cond[prompts])
        return {name: value for name, value in found.items() if name != "image_ids"}

    examples = inputs(slice(None), (nodes * len(latents))[: len(latents)])
    names = list(examples)

    def call(net: nn.Module, *args: Tensor) -> Tensor:
        return predict(net, dict(zip(names, args, strict=True)) | {"image_ids": grid(args[0].shape[0], rows, columns, args[0].device)})

    return Component("transformer", Call(pipe.transformer, call), examples, ("sample",), {}, tuple(inputs(slice(1), [s]) for s in nodes))
