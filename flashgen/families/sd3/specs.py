"""Architectures by name: `shapes` (the embedded world), `tiny` (tests), `sd35-medium` and its relatives (full size)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashgen.errors import UsageError


@dataclass(frozen=True)
class Spec:
    """Constructor arguments of an SD3-class pipeline's networks, plus its token lengths."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip_l: dict[str, Any]
    clip_g: dict[str, Any]
    t5: dict[str, Any]
    clip_tokens: int
    t5_tokens: int
    clip_positions: bool = True

    def shallow(self, layers: int) -> Spec:
        """A spec of the same widths with at most `layers` layers in every network."""

        def cut(config: dict[str, Any], key: str) -> dict[str, Any]:
            return config | {key: min(layers, config[key])}

        dual = {"dual_attention_layers": tuple(i for i in self.transformer["dual_attention_layers"] if i < layers)}
        clip_l, clip_g = (cut(config, "num_hidden_layers") for config in (self.clip_l, self.clip_g))
        transformer = cut(self.transformer, "num_layers") | dual
        return replace(self, transformer=transformer, clip_l=clip_l, clip_g=clip_g, t5=cut(self.t5, "num_layers"))


def _transformer(
    layers: int, heads: int, head_dim: int, *, joint: int, pooled: int, sample: int, table: int, dual: int, norm: str | None = "rms_norm"
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "caption_projection_dim": heads * head_dim,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "sample_size": sample,
        "pos_embed_max_size": table,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": norm,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
    }


def _vae(
    channels: tuple[int, ...], *, layers: int, groups: int, attention: bool, sample: int, scale: float, shift: float
) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "mid_block_add_attention": attention,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "sample_size": sample,
        "scaling_factor": scale,
        "shift_factor": shift,
    }


def _clip(width: int, layers: int, heads: int, *, ffn: int, tokens: int, act: str, vocab: int | None = None) -> dict[str, Any]:
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "projection_dim": width,
        "max_position_embeddings": tokens,
        "hidden_act": act,
    }
    return config | ({"vocab_size": vocab} if vocab else {})


def _t5(width: int, layers: int, heads: int, *, kv: int, ffn: int, vocab: int | None = None) -> dict[str, Any]:
    config = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": kv, "d_ff": ffn, "feed_forward_proj": "gated-gelu"}
    return config | ({"vocab_size": vocab} if vocab else {})


SPECS = {
    "shapes": Spec(
        _transformer(6, 4, 32, joint=128, pooled=112, sample=8, table=16, dual=3),
        _vae((16, 32, 64, 64), layers=1, groups=8, attention=False, sample=64, scale=1.0, shift=0.0),
        _clip(48, 2, 4, ffn=96, tokens=16, act="quick_gelu"),
        _clip(64, 2, 4, ffn=128, tokens=16, act="gelu"),
        _t5(128, 4, 4, kv=32, ffn=256),
        clip_tokens=16,
        t5_tokens=16,
        clip_positions=False,
    ),
    "tiny": Spec(
        _transformer(2, 2, 16, joint=32, pooled=32, sample=8, table=32, dual=1),
        _vae((8, 8, 8, 8), layers=1, groups=4, attention=False, sample=64, scale=1.0, shift=0.0),
        _clip(16, 2, 2, ffn=32, tokens=16, act="quick_gelu"),
        _clip(16, 2, 2, ffn=32, tokens=16, act="gelu"),
        _t5(32, 2, 2, kv=16, ffn=64),
        clip_tokens=16,
        t5_tokens=16,
    ),
    "sd35-medium": Spec(
        _transformer(24, 24, 64, joint=4096, pooled=2048, sample=128, table=384, dual=13),
        _vae((128, 256, 512, 512), layers=2, groups=32, attention=True, sample=1024, scale=1.5305, shift=0.0609),
        _clip(768, 12, 12, ffn=3072, tokens=77, act="quick_gelu", vocab=49408),
        _clip(1280, 32, 20, ffn=5120, tokens=77, act="gelu", vocab=49408),
        _t5(4096, 24, 64, kv=64, ffn=10240, vocab=32128),
        clip_tokens=77,
        t5_tokens=256,
    ),
}


MEDIUM = SPECS["sd35-medium"]
SPECS |= {
    "sd3-medium": replace(MEDIUM, transformer=_transformer(24, 24, 64, joint=4096, pooled=2048, sample=128, table=192, dual=0, norm=None)),
    "sd35-large": replace(MEDIUM, transformer=_transformer(38, 38, 64, joint=4096, pooled=2048, sample=128, table=192, dual=0)),
}


def spec(name: str) -> Spec:
    """The architecture called `name`. Raises UsageError for an unknown name."""
    if name not in SPECS:
        raise UsageError(f"--like '{name}' is not an architecture; choose from {', '.join(SPECS)}")
    return SPECS[name]
