"""Building SD3-class pipelines with random weights from a `Spec`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flashgen import families
from flashgen.families.sd3.sampling import SHIFT
from flashgen.families.sd3.specs import Spec
from flashgen.families.sd3.tokenizers import COMMON_WORDS, clip_tokenizer, t5_tokenizer
from flashgen.models.pipeline import Pipeline


def clip_config(config: dict[str, object], vocab: int) -> CLIPTextConfig:
    """`vocab` is the tokenizer's size, whose last two ids are BOS and EOS; the spec may fix a larger embedding."""
    return CLIPTextConfig(
        **{"vocab_size": vocab, **config, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    )


def t5_config(config: dict[str, object], vocab: int) -> T5Config:
    """An encoder-only T5 without dropout; the spec may fix a larger vocabulary than the tokenizer's."""
    return T5Config(**{"vocab_size": vocab, "dropout_rate": 0.0, **config, "is_encoder_decoder": False, "use_cache": False})


def tokenizers(spec: Spec, words: Sequence[str]) -> dict[str, Any]:
    """The three tokenizers by component."""
    clip = {name: clip_tokenizer(spec.clip_tokens, words) for name in ("tokenizer", "tokenizer_2")}
    return {**clip, "tokenizer_3": t5_tokenizer(spec.t5_tokens, words)}


def networks(spec: Spec, vocab_clip: int, vocab_t5: int) -> dict[str, Any]:
    """The five networks by component, initialised as their classes do it, on torch's default device."""
    clips = [CLIPTextModelWithProjection(clip_config(config, vocab_clip)) for config in (spec.clip_l, spec.clip_g)]
    return {
        "transformer": SD3Transformer2DModel(**spec.transformer),
        "vae": AutoencoderKL(**spec.vae),
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": T5EncoderModel(t5_config(spec.t5, vocab_t5)),
    }


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler with its timestep shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def build_pipeline(spec: Spec, seed: int, words: Sequence[str] = COMMON_WORDS) -> Pipeline:
    """A pipeline with seeded random weights (fp32), in memory only."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**spec.vae)
    tokens = tokenizers(spec, words)
    clips = [CLIPTextModelWithProjection(clip_config(c, len(tokens["tokenizer"]))) for c in (spec.clip_l, spec.clip_g)]
    if not spec.clip_positions:
        for clip in clips:  # our choice: these encoders know order by their causal mask alone, like CLIP's bags of words
            clip.text_model.embeddings.position_embedding.weight.data.zero_()
    parts = {
        "transformer": SD3Transformer2DModel(**spec.transformer),
        "vae": vae,
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": T5EncoderModel(t5_config(spec.t5, len(tokens["tokenizer_3"]))),
        **tokens,
        "scheduler": scheduler(),
    }
    return Pipeline(families.get("sd3"), Path(), parts)
