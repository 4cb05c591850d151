"""Prompts to token ids, padded and cut as diffusers does it, without transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.files import check_file
from flashgen.errors import ArtifactError, foreign
from flashgen.progress import warn

NAMED = 3  # prompts that are cut, of those of one request
_COUNTS: ContextVar[Counter[str] | None] = ContextVar("counts", default=None)  # prompts cut inside `counted_cuts`, by tokenizer


class Tokens(NamedTuple):
    """Token ids and attention mask (1 for tokens of the prompt, 0 for padding), int64 [B, length] each."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]


class PromptTokenizer:
    """A `tokenizer.json` that adds its special tokens itself; `pad_id` fills up to `length`."""

    def __init__(self, file: Path, length: int, pad_id: int) -> None:
        from tokenizers import Tokenizer

        check_file(file)
        self.file = file
        with self._clear():
            self.tokenizer = Tokenizer.from_file(str(file))
        self.label, self.length, self.pad_id = file.parent.name, length, pad_id
        self.tokenizer.no_padding()

    def _clear(self) -> AbstractContextManager[None]:
        mend = f"check it with: flashgen show {self.file.parents[1]} --verify"
        return foreign(lambda why: ArtifactError(f"{self.file} is no tokenizer ({why}); {mend}"))

    def encode(self, prompts: list[str]) -> Tokens:
        """Tokens of `prompts`. Warns about every prompt that is cut."""
        tokens = Tokens(np.full((len(prompts), self.length), self.pad_id, np.int64), np.zeros((len(prompts), self.length), np.int64))
        for row, prompt in enumerate(prompts):
            with self._clear():
                self.tokenizer.no_truncation()
                ids = self.tokenizer.encode(prompt).ids
                if len(ids) > self.length:
                    warn_cut(prompt, self.label, len(ids), self.length)
                    self.tokenizer.enable_truncation(self.length)
                    ids = self.tokenizer.encode(prompt).ids
            tokens.ids[row, : len(ids)] = ids
            tokens.mask[row, : len(ids)] = 1
        return tokens


def warn_cut(prompt: str, tokenizer: str, count: int, limit: int) -> None:
    """Warn that `tokenizer` uses `limit` of a prompt's `count` tokens."""
    counts = _COUNTS.get()
    if counts is not None:
        counts[tokenizer] += 1
        if counts[tokenizer] > NAMED:
            return
    warn(f"{tokenizer} cuts the prompt after {limit} of {count} tokens, the rest has no effect on it: '{prompt[:60]}...'")


@contextmanager
def counted_cuts() -> Iterator[None]:
    """Inside, warn about the first `NAMED` prompts that each tokenizer cuts; on leaving, say how many there were."""
    counts = Counter[str]()
    token = _COUNTS.set(counts)
    try:
        yield
    finally:
        _COUNTS.reset(token)
        for tokenizer, count in counts.items():
            if count > NAMED:
                warn(f"{tokenizer} cut {count} prompts in all")
