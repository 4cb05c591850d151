"""Attention of the transformer as one fused operator, which both onnxruntime and OpenVINO implement.

Traced as diffusers writes it, a layer becomes two products of all heads with a softmax [B, H, L, L] in memory between them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.onnx.ops import symbolic


def fuse_attention(transformer: SD3Transformer2DModel) -> None:
    """Replace attention and RMS norms of `transformer` by fused operators, in place; afterwards it runs inside `torch.onnx.export` only."""
    transformer.set_attn_processor(FusedAttention())


class FusedAttention:
    """diffusers' JointAttnProcessor2_0 with the heads side by side in the last axis throughout: image tokens first, then text.

    `symbolic` returns tensors on the CPU; they are moved to the device of the network, which may be traced on `meta`.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs [B, L, D] of the image tokens and, in joint attention, of the text tokens."""
        x, text = hidden_states, encoder_hidden_states
        q, k, v = _by_head(attn, attn.to_q(x), attn.norm_q), _by_head(attn, attn.to_k(x), attn.norm_k), attn.to_v(x)
        if text is not None:
            q = torch.cat([q, _by_head(attn, attn.add_q_proj(text), attn.norm_added_q)], 1)
            k = torch.cat([k, _by_head(attn, attn.add_k_proj(text), attn.norm_added_k)], 1)
            v = torch.cat([v, attn.add_v_proj(text)], 1)
        heads: dict[str, Any] = {"num_heads": attn.heads}
        out = symbolic("com.microsoft::MultiHeadAttention", [q, k, v], heads, dtype=q.dtype, shape=q.shape, version=1).to(q.device)
        project = attn.to_out[0]  # to_out[1] is dropout
        if text is None:
            return project(out)  # type: ignore[no-any-return]  # untyped in diffusers
        image, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return project(image), rest if attn.context_pre_only else attn.to_add_out(rest)


def _by_head(attn: Any, x: Tensor, norm: Any) -> Tensor:
    """RMS norm of each head of `x` [B, L, heads x D]; `x` itself where the network has no such norm (SD3-Medium)."""
    if norm is None:
        return x
    split = x.reshape(*x.shape[:-1], attn.heads, -1)
    options: dict[str, Any] = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
    name = "SimplifiedLayerNormalization"
    normed = symbolic(name, [split, norm.weight], options, dtype=x.dtype, shape=split.shape, version=1)
    return normed.to(x.device).flatten(-2)
