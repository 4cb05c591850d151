"""Tokenizers of fabricated pipelines: real CLIP (byte-level BPE) and T5 (Unigram) classes over a small vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5TokenizerFast

# The vocabulary of fabricated pipelines, a single token per word. It covers the captions that tests and demos use.
COMMON_WORDS = tuple(
    sorted(
        [
            "a",
            "above",
            "an",
            "and",
            "at",
            "background",
            "below",
            "bird",
            "black",
            "blue",
            "boat",
            "car",
            "cat",
            "circle",
            "circles",
            "city",
            "cross",
            "crosses",
            "cyan",
            "day",
            "dog",
            "face",
            "field",
            "flower",
            "forest",
            "four",
            "gray",
            "green",
            "house",
            "in",
            "left",
            "light",
            "man",
            "moon",
            "mountain",
            "night",
            "of",
            "on",
            "one",
            "orange",
            "person",
            "photo",
            "picture",
            "pink",
            "purple",
            "red",
            "right",
            "river",
            "road",
            "sea",
            "sky",
            "small",
            "square",
            "squares",
            "street",
            "sun",
            "the",
            "three",
            "to",
            "tree",
            "triangle",
            "triangles",
            "two",
            "under",
            "water",
            "white",
            "with",
            "woman",
            "yellow",
        ]
    )
)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(max_length: int, words: Sequence[str] = COMMON_WORDS) -> CLIPTokenizer:
    """BPE whose merges are trained until each of `words` is one token; other words fall into bytes."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Named in advance: the trainer numbers last letters as it meets them, in another order every time, and breaks ties by number.
    last = sorted({word[-1] + "</w>" for word in words})
    trainer = BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, special_tokens=[*alphabet, *last],
        end_of_word_suffix="</w>", min_frequency=1, show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(words, trainer)
    trained = json.loads(bpe.to_str())["model"]
    symbols = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    symbols += [a + "</w>" for a in alphabet if a + "</w>" not in trained["vocab"]] + [BOS, EOS]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int, words: Sequence[str] = COMMON_WORDS) -> T5TokenizerFast:
    """Unigram with one piece per word of `words` and single characters as a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789'-,."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)
