"""Tokenizers of the shapes world: real CLIP (byte-level BPE) and T5 (Unigram) classes over a small vocabulary."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5TokenizerFast

from flashgen.shapes.scene import BACKGROUNDS, COLORS, NUMBERS, PLURALS, RELATIONS, SHAPES

WORDS = sorted(
    {*SHAPES, *PLURALS.values(), *COLORS, *BACKGROUNDS, *NUMBERS.values(), "an", "and", "on", "background", "of", "to", "the", "one"}
    | {word for relation in RELATIONS for word in relation.split()}
)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """BPE whose merges are trained until each word of the grammar is one token; other words fall into bytes."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Named in advance: the trainer numbers last letters as it meets them, in another order every time, and breaks ties by number.
    last = sorted({word[-1] + "</w>" for word in WORDS})
    trainer = BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, special_tokens=[*alphabet, *last],
        end_of_word_suffix="</w>", min_frequency=1, show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(WORDS, trainer)
    trained = json.loads(bpe.to_str())["model"]
    symbols = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    symbols += [a + "</w>" for a in alphabet if a + "</w>" not in trained["vocab"]] + [BOS, EOS]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int) -> T5TokenizerFast:
    """Unigram with one piece a word of the grammar and single characters as a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789'-,."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)
