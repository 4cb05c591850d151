from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.device.tokens import NAMED, PromptTokenizer, counted_cuts
from flashgen.errors import ArtifactError
from flashgen.families.sd3.tokenizers import clip_tokenizer, t5_tokenizer

PROMPTS = [
    "",
    "two red circles on a white background",
    "a Photo of a cat, 123!",
    "ein Bär äöü 猫",
    " ".join(["four green triangles and"] * 9),
]


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_ids_and_mask_equal_those_of_transformers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs: Any = clip_tokenizer(16) if kind == "clip" else t5_tokenizer(16)
    theirs.save_pretrained(tmp_path / "tokenizer")
    ours = PromptTokenizer(tmp_path / "tokenizer" / "tokenizer.json", 16, theirs.pad_token_id)
    want = theirs(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="np")
    found = ours.encode(PROMPTS)
    np.testing.assert_array_equal(found.ids, want.input_ids)
    np.testing.assert_array_equal(found.mask, want.attention_mask)
    assert found.ids.dtype == found.mask.dtype == np.int64
    assert capsys.readouterr().err.count("'four green triangles") == 1  # the long prompt is named


def test_a_panic_of_the_tokenizer_is_an_artifact_error(tmp_path: Path) -> None:
    """A regular expression that backtracks without end: the Rust library panics, and its exception is no Exception."""
    clip_tokenizer(16).save_pretrained(tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "([a-z ]+)+="}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ArtifactError, match=r"tokenizer.json is no tokenizer \(.*retry-limit"):
        PromptTokenizer(tmp_path / "tokenizer.json", 16, 0).encode(["a photo of a cat on a street at night"])


def test_broken_tokenizer_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        PromptTokenizer(tmp_path / "tokenizer.json", 16, 0)


def test_many_prompts_that_are_cut_are_counted_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_tokenizer(16).save_pretrained(tmp_path / "tokenizer")
    ours = PromptTokenizer(tmp_path / "tokenizer" / "tokenizer.json", 16, 0)
    with counted_cuts():
        for _ in range(4):
            ours.encode([PROMPTS[-1]] * 5 + PROMPTS[:2])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == NAMED + 1 and lines[-1] == "warning: tokenizer cut 20 prompts in all"
    ours.encode([PROMPTS[-1]] * 5)
    assert len(capsys.readouterr().err.splitlines()) == 5
