"""Building SD3-class pipelines with random weights from a `Spec`."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flashgen.models.specs import Spec
from flashgen.models.tokenizers import clip_tokenizer, t5_tokenizer

SHIFT = 3.0  # SD3's timestep shift, part of the model family's contract


def clip_config(config: dict[str, object], vocab: int) -> CLIPTextConfig:
    """`vocab` is the tokenizer's size, whose last two ids are BOS and EOS; the spec may fix a larger embedding."""
    return CLIPTextConfig(
        **{"vocab_size": vocab, **config, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    )


def t5_config(config: dict[str, object], vocab: int) -> T5Config:
    return T5Config(**{"vocab_size": vocab, "dropout_rate": 0.0, **config, "is_encoder_decoder": False, "use_cache": False})


def build_pipeline(spec: Spec, seed: int) -> StableDiffusion3Pipeline:
    """A whole pipeline with seeded random weights (fp32)."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**spec.vae)
    clip_tok, t5_tok = clip_tokenizer(spec.clip_tokens), t5_tokenizer(spec.t5_tokens)
    clips = [CLIPTextModelWithProjection(clip_config(c, len(clip_tok))) for c in (spec.clip_l, spec.clip_g)]
    if not spec.clip_positions:
        for clip in clips:  # our choice: order is known to these encoders by their causal mask alone, like CLIP's bags of words
            clip.text_model.embeddings.position_embedding.weight.data.zero_()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**spec.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=clip_tok,
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer(spec.clip_tokens),
        text_encoder_3=T5EncoderModel(t5_config(spec.t5, len(t5_tok))),
        tokenizer_3=t5_tok,
    )
