from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from flashgen.families.sd3.tokenizers import BOS, COMMON_WORDS, EOS, clip_tokenizer, t5_tokenizer
from flashgen.worlds.shapes.data import WORDS
from flashgen.worlds.shapes.scene import prompt_set

CAPTIONS = [r.caption() for r in prompt_set(0, 20)]
STRANGE = ["", "a Dog, on fire!", "naïve 日本", "circlesquare", "a  red\tcircle"]


WORD_LISTS = pytest.mark.parametrize("words", [COMMON_WORDS, WORDS], ids=["common", "shapes"])


@WORD_LISTS
def test_words_cover_the_grammar(words: Sequence[str]) -> None:
    assert {word for caption in CAPTIONS for word in caption.split()} <= set(words)


@WORD_LISTS
def test_clip_gives_each_word_one_token_between_its_marks(words: Sequence[str]) -> None:
    tokenizer = clip_tokenizer(16, words)
    for word in words:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3 and tokenizer.convert_ids_to_tokens(ids) == [BOS, f"{word}</w>", EOS]
    for caption in CAPTIONS:
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2 <= 16
    padded = tokenizer("a circle", padding="max_length", max_length=16).input_ids
    assert len(padded) == 16 and len({tokenizer.bos_token_id, tokenizer.eos_token_id}) == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)  # build.clip_config says so


@WORD_LISTS
def test_t5_gives_each_word_one_token_and_an_end(words: Sequence[str]) -> None:
    tokenizer = t5_tokenizer(16, words)
    for word in words:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids) == [f"▁{word}", "</s>"]
    for caption in CAPTIONS:
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 1 <= 16
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@WORD_LISTS
def test_different_words_have_different_tokens(words: Sequence[str]) -> None:
    for tokenizer in (clip_tokenizer(16, words), t5_tokenizer(16, words)):
        assert len({tuple(tokenizer(word).input_ids) for word in words}) == len(words)


@pytest.mark.parametrize(("make", "kind"), [(clip_tokenizer, CLIPTokenizer), (t5_tokenizer, T5TokenizerFast)], ids=["clip", "t5"])
def test_tokenizers_survive_save_and_load(make, kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make(16)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (kind.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        options = {"padding": "max_length", "max_length": 16, "truncation": True}
        assert loaded(CAPTIONS + STRANGE, **options).input_ids == tokenizer(CAPTIONS + STRANGE, **options).input_ids
        assert loaded.model_max_length == 16 and len(loaded) == len(tokenizer)
        assert type(loaded).__name__.removesuffix("Fast") == kind.__name__.removesuffix("Fast")


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer], ids=["clip", "t5"])
def test_tokenizers_are_the_same_every_time(make) -> None:  # type: ignore[no-untyped-def]
    """A teacher's embeddings belong to these numbers: training resumes in another process, which builds its own tokenizers."""
    vocabularies = [make(16).get_vocab() for _ in range(4)]
    assert all(v == vocabularies[0] for v in vocabularies)
    assert all(0 <= i < len(make(16)) for text in STRANGE for i in make(16)(text).input_ids)


def test_words_keep_the_numbers_that_the_embedded_teacher_was_trained_on() -> None:
    prompt = "a red circle left of two blue squares on a white background"
    assert clip_tokenizer(16, WORDS)(prompt).input_ids == [602, 256, 332, 336, 349, 311, 351, 329, 341, 312, 256, 352, 357, 603]
    assert t5_tokenizer(16, WORDS)(prompt).input_ids == [4, 25, 12, 20, 21, 34, 11, 28, 22, 4, 35, 8, 1]


def test_words_outside_the_vocabulary_fall_into_pieces() -> None:
    assert len(clip_tokenizer(16, ["circle"])("square").input_ids) > 3 < len(clip_tokenizer(16)("lighthouse").input_ids)
