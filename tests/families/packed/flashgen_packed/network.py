"""A small single-stream transformer on packed latents: text and image tokens attend to each other in every layer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

LARGEST_PERIOD = 100.0  # of the position encoding, in tokens


class Modulation(nn.Module):
    """The adaLN Linear of one layer: six vectors [B, 1, width] from one vector [B, width] per picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.linear(vector)[:, None].chunk(6, -1)
        return parts


class MLP(nn.Module):
    """Feed-forward part of one layer. Its first Linear is called `up`, like the second factor of a low-rank layer in flashgen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(silu(self.up(x)))
        return out


class Layer(nn.Module):
    """Joint self-attention and MLP; returns one tensor [B, image tokens + text tokens, width]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ada = Modulation(width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = MLP(width)

    def forward(self, x: Tensor, vector: Tensor, mask: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.ada(vector)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift, mask)
        out: Tensor = x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)
        return out

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention of all tokens to those where `mask` (bool [B, 1, 1, tokens]) is true."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return out


class PackedTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts -v at time 1 - sigma. Image tokens come first; their places are sines and cosines of rows and columns, for any grid."""

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, in_channels: int, patch_size: int, width: int, num_heads: int, num_layers: int, text_width: int) -> None:
        super().__init__()
        token = in_channels * patch_size**2
        self.image_in = nn.Linear(token, width)
        self.text_in = nn.Linear(text_width, width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final = nn.Linear(width, token)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        image_ids: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor] | dict[str, Tensor]:
        """-v [B, L, C p p] for tokens [B, L, C p p], text [B, T, D] with its mask [B, T] of 0 and 1, times [B] and places [B, L, 2]."""
        config: Any = self.config
        tokens = hidden_states.shape[1]
        vector = self.time_in(get_timestep_embedding(1000 * timestep.float(), config.width).to(hidden_states.dtype))
        image = self.image_in(hidden_states) + places(image_ids, config.width).to(hidden_states.dtype)
        x = torch.cat([image, self.text_in(encoder_hidden_states)], 1)
        mask = torch.cat([torch.ones_like(hidden_states[..., 0]), encoder_attention_mask.to(hidden_states.dtype)], 1)[:, None, None] > 0.5
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, vector, mask)
            else:
                x = layer(x, vector, mask)
        output = self.final(self.norm(x[:, :tokens]))
        return {"sample": output} if return_dict else (output,)


def places(ids: Tensor, width: int) -> Tensor:
    """Position encoding [B, L, width] of rows and columns `ids` [B, L, 2]."""
    count = width // 4
    rates = LARGEST_PERIOD ** (-torch.arange(count, device=ids.device) / count)
    angles = ids[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
