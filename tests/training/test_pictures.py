"""Latents of real pictures on the disk: rows without a picture, and what is not computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashgen.training import pictures
from flashgen.training.pictures import write_latents


def test_rows_without_a_picture_are_left_out_and_stored_ones_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "SHARD", 4)
    asked = list[int]()

    def latent(row: int) -> Tensor | None:
        asked.append(row)
        if row == 6 and len(asked) < 10:
            raise KeyboardInterrupt
        return None if row == 1 else torch.full((2, 3, 3), torch.inf if row == 7 else float(row))

    with pytest.raises(KeyboardInterrupt):
        write_latents(latent, 9, (2, 3, 3), tmp_path)
    latents, rows, _ = write_latents(latent, 9, (2, 3, 3), tmp_path)
    assert asked == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    assert rows.tolist() == [0, 2, 3, 4, 5, 6, 8] and latents.dtype == torch.float16
    assert all((latents[row] == row).all() for row in rows.tolist())
