"""A pipeline of the packed family with seeded random weights."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from flashgen.families.base import Family
from flashgen.models.pipeline import Pipeline

from . import ENCODER, PATCH
from .network import PackedTransformer
from .sampling import SHIFT, SIDE_PX, TOKENS

WORDS = (
    "a", "an", "and", "bird", "black", "blue", "boat", "cat", "circle", "dog", "green", "house", "in",
    "moon", "of", "on", "red", "sea", "sky", "square", "sun", "the", "tree", "two", "white",
)  # fmt: skip
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT_WIDTH = 48


def build_pipeline(family: Family, seed: int, layers: int | None = None, words: Sequence[str] | None = None) -> Pipeline:
    """A pipeline in memory, fp32, in eval mode, with at most `layers` layers in each transformer."""
    tokens = tokenizer(words or WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": transformer(min(3, layers or 3)),
            "vae": autoencoder(),
            ENCODER: BertModel(bert_config(len(tokens), min(2, layers or 2))),
            "tokenizer": tokens,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        }
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return Pipeline(family, Path(), parts)


def transformer(layers: int) -> nn.Module:
    """Weights large enough for pictures to depend on their prompts."""
    network: nn.Module = PackedTransformer(in_channels=4, patch_size=PATCH, width=32, num_heads=2, num_layers=layers, text_width=TEXT_WIDTH)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return network


def autoencoder() -> AutoencoderKL:
    """Three levels, so factor 4; both quantization convolutions and attention in the middle."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE_PX,
        scaling_factor=0.7,
        shift_factor=0.2,
    )


def bert_config(vocabulary: int, layers: int) -> BertConfig:
    """A BERT without dropout."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )


def tokenizer(words: Sequence[str]) -> BertTokenizerFast:
    """WordPiece with one token per word of `words`; other words become letters."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)])
    return BertTokenizerFast(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=TOKENS)
