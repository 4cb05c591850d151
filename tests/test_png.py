from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashgen.errors import UsageError
from flashgen.pixels import Size
from flashgen.png import read_texts, sheet, texts, write_png


def test_png_keeps_pixels_and_texts_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    chunks = texts("ein Bär 猫", 7, [1.0, 0.9, 0.0], "a" * 64, guidance=4.5)
    write_png(tmp_path / "a.png", image, chunks)
    write_png(tmp_path / "b.png", image, chunks)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image)
        got = {k: str(v) for k, v in read.info.items()}
    assert got == chunks
    assert got["prompt"] == "ein Bär 猫" and got["seed"] == "7" and got["sigmas"] == "[1.0, 0.9, 0.0]" and "flashgen" in got
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_options_are_read_back_with_the_size_when_the_picture_is_not_square(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((16, 24, 3), np.uint8), texts("a cat", 2**64 - 1, [1.0, 0.0], "b" * 64, guidance=2.5))
    found = read_texts(tmp_path / "a.png")
    assert found["size_px"] == Size(height=16, width=24)
    assert (found["prompt"], found["seed"], found["sigmas"], found["guidance"], found["negative"]) == (
        "a cat",
        2**64 - 1,
        [1.0, 0.0],
        2.5,
        "",
    )


@pytest.mark.parametrize("content", [b"", b"no png", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"a.png is no PNG that can be read .*give a picture of flashgen generate"):
        read_texts(tmp_path / "a.png")
    write_png(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8), {})
    with pytest.raises(UsageError, match="does not say how it was made"):
        read_texts(tmp_path / "b.png")


def test_sheet_places_pictures_row_by_row() -> None:
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    page = sheet(images, columns=2)
    assert page.shape == (4, 6, 3)
    assert (page[0, 0, 0], page[0, 3, 0], page[2, 0, 0], page[2, 3, 0]) == (10, 20, 30, 255)
    assert sheet(images).shape == (4, 6, 3)
