"""Small discriminator heads on the image tokens of the proxy's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """One small convolutional discriminator a tapped block: tokens [B, L, width] of a square latent to a logit, [B, heads] in all.

    Every head looks at its block's tokens as an image (our choice, after FastGen's DiT heads): 3x3, group norm, leaky ReLU, 1x1, mean.
    """

    def __init__(self, blocks: list[int], width: int, channels: int = 64) -> None:
        super().__init__()
        self.blocks = blocks
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 1))
            for _ in blocks
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        logits = []
        for head, tokens in zip(self.heads, features, strict=True):
            side = round(tokens.shape[1] ** 0.5)
            image = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
            logits.append(head(image.float()).mean(dim=(1, 2, 3)))  # the backbone may be in bf16
        return torch.stack(logits, 1)

    @torch.no_grad()
    def refresh(self, probability: float, optimizer: torch.optim.Optimizer, g: torch.Generator) -> int:
        """Each head forgets everything, its optimizer state too, with `probability` (SD3.5-Flash: 0.005). Returns how many did."""
        drawn = torch.rand(len(self.heads), generator=g) < probability
        seed = int(torch.randint(2**62, (), generator=g))
        for head, forget in zip(self.heads, drawn.tolist(), strict=True):
            if forget:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    for layer in head.modules():
                        if isinstance(layer, nn.Conv2d | nn.GroupNorm):
                            layer.reset_parameters()
                for parameter in head.parameters():
                    optimizer.state.pop(parameter, None)
        return int(drawn.sum())


class Tap:
    """Keeps the image stream behind the given blocks of an SD3 transformer while it is open; `read()` empties it."""

    def __init__(self, transformer: nn.Module, blocks: list[int]) -> None:
        self.features: dict[int, Tensor] = {}
        layers: Any = transformer.transformer_blocks
        self.handles = [layers[i].register_forward_hook(self._keep(i)) for i in blocks]
        self.blocks = blocks

    def _keep(self, block: int) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
        def hook(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            self.features[block] = output[1]

        return hook

    def read(self) -> list[Tensor]:
        """Hidden states [B, L, width] of the last forward, in the order of `blocks`."""
        found = [self.features[block] for block in self.blocks]
        self.features.clear()
        return found

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
