"""Small discriminator heads on the image features of the fake score's blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning
from flashgen.randomness import seeded
from flashgen.runtime.processes import sharded
from flashgen.training.roles import unwrap


class Heads(nn.Module):
    """One small convolutional discriminator per block in `blocks`.

    3x3 convolution, group norm, leaky ReLU, 1x1 convolution, mean (our choice, after FastGen's DiT heads).
    """

    def __init__(self, blocks: Sequence[int], width: int, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 1))
            for _ in blocks
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits [B, heads] of image features, one [B, width, rows, columns] per head. Gradient: the heads and `features`."""
        images = zip(self.heads, features, strict=True)
        return torch.stack([head(image.float()).mean(dim=(1, 2, 3)) for head, image in images], 1)  # a backbone may be in bf16

    @torch.no_grad()
    def refresh(self, probability: float, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Initialise each head again, with its optimizer state, with `probability` (SD3.5-Flash: 0.005). Returns how many were."""
        chosen = torch.rand(len(self.heads), generator=generator) < probability
        seeds = torch.randint(2**62, (len(self.heads),), generator=generator)
        for index in chosen.nonzero().flatten().tolist():
            fresh = copy.deepcopy(self.heads[index]).cpu()  # numbers of the CPU's generator on every device
            with seeded(int(seeds[index])):
                for layer in fresh.modules():
                    if isinstance(layer, nn.Conv2d | nn.GroupNorm):
                        layer.reset_parameters()
            self.heads[index].load_state_dict(fresh.state_dict())
            for parameter in self.heads[index].parameters():
                optimizer.state.pop(parameter, None)
        return int(chosen.sum())


def block_features(network: nn.Module, blocks: Sequence[int], x: Tensor, sigma: Tensor, cond: Conditioning) -> list[Tensor]:
    """Image features [B, width, rows, columns] behind each of `blocks` in one forward pass at latents `x`. Gradient: network and `x`."""
    family, outputs = cond.family, dict[int, Any]()

    def keep(block: int, module: nn.Module, inputs: object, output: object) -> None:
        outputs[block] = output

    layers = family.blocks(unwrap(network))
    handles = [layers[block].register_forward_hook(partial(keep, block)) for block in blocks]
    try:
        v = velocity(network, x, sigma, cond)
    finally:
        for handle in handles:
            handle.remove()
    features = [family.block_features(outputs[block], x) for block in blocks]
    # A sharded network gathers its weights for a backward pass that starts at its output, as this one then does.
    return [feature + 0 * v.mean() for feature in features] if sharded() else features
