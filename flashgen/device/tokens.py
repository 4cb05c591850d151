"""Prompts to token ids, padded and cut as diffusers does it, without transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashgen.errors import ArtifactError
from flashgen.progress import warn


class PromptTokenizer:
    """`tokenizer.json` adds the special tokens (CLIP: start and end, T5: end); `pad_id` fills up to `length`."""

    def __init__(self, file: Path, length: int, pad_id: int) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ArtifactError(f"{file} is no tokenizer ({error}); check it with: flashgen show {file.parents[1]} --verify") from error
        self.label, self.length, self.pad_id = file.parent.name, length, pad_id
        self.tokenizer.no_padding()

    def encode(self, prompts: list[str]) -> NDArray[np.int64]:
        """Ids [B, length]. Warns about every prompt that loses its end."""
        ids = np.full((len(prompts), self.length), self.pad_id, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            self.tokenizer.no_truncation()
            found = self.tokenizer.encode(prompt).ids
            if len(found) > self.length:
                warn_cut(prompt, self.label, len(found), self.length)
                self.tokenizer.enable_truncation(self.length)
                found = self.tokenizer.encode(prompt).ids
            row[: len(found)] = found
        return ids


def warn_cut(prompt: str, tokenizer: str, found: int, limit: int) -> None:
    warn(f"{tokenizer} cuts the prompt after {limit} of {found} tokens, the rest has no effect on it: '{prompt[:60]}...'")
