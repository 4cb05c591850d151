from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashgen import png
from flashgen.errors import UsageError
from flashgen.pixels import Size
from flashgen.png import fit, read_picture, read_texts, sheet, texts, write_png


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


# reading any picture


def stored(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> io.BytesIO:
    """A file of `pixels`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file


def test_a_picture_is_upright_on_white_and_has_its_greys() -> None:
    top = np.zeros((4, 6, 3), np.uint8)
    top[:2] = 200
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    upright = read_picture(stored(np.rot90(top), exif=turned))
    assert np.array_equal(upright, top)
    clear = np.dstack([top, np.full((4, 6), 255, np.uint8)])
    clear[2:, :, 3] = 0  # whatever colour is under it
    assert np.array_equal(read_picture(stored(clear)), np.where(top == 0, 255, top))
    grey = np.repeat(np.arange(4, dtype=np.uint16)[:, None] * 21845, 6, 1)
    assert read_picture(stored(grey))[:, 0].tolist() == [[0] * 3, [85] * 3, [170] * 3, [255] * 3]


def test_a_picture_of_other_proportions_is_cut_at_its_sides() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (fit(wide, Size(8, 8)) > 250).all() and fit(wide, Size(16, 16)).shape == (16, 16, 3)


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has this size, with `chunks` before its pixels."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BOMBS = {
    "large": png_of(10_000, 10_000),
    "huge": png_of(20_000, 20_000),
    "huger": png_of(2**31 - 1, 2**31 - 1),
    "cut": png_of(64, 64),
    "text bomb": png_of(8, 8, (b"zTXt", b"prompt\0\0" + zlib.compress(bytes(1 << 24)))),
    "false animation": png_of(8, 8, (b"acTL", struct.pack(">II", 2**31 - 1, 0)), (b"fcTL", bytes(26)), (b"fdAT", b"")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_lies_is_one_sentence_without_a_warning(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, OSError)):
        read_picture(io.BytesIO(BOMBS[name]))
    assert capfd.readouterr() == ("", "")


def test_a_picture_is_refused_by_its_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "MAX_PIXELS", 99)
    with pytest.raises(ValueError, match="20x5 are more than 99 pixels"):
        read_picture(stored(np.zeros((5, 20, 3), np.uint8)))
    assert read_picture(stored(np.zeros((9, 11, 3), np.uint8))).shape == (9, 11, 3)


@pytest.mark.parametrize(
    ("key", "text"),
    [("sigmas", "[" * 60_000), ("sigmas", "9" * 400), ("sigmas", f"[{'9' * 400}]"), ("seed", "9" * 5000), ("prompt", "x" * 70_000),
     ("sigmas", json.dumps([0.5] * 20_000)), ("guidance", "[]"), ("seed", "7.5"), ("sigmas", "{}x"), ("sigmas", "[null]")],
)  # fmt: skip
def test_text_chunks_of_any_kind_are_one_sentence(key: str, text: str, tmp_path: Path) -> None:
    good = texts("a cat", 1, [1.0, 0.0], "a" * 64)
    write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), good | {key: text})
    with pytest.raises(UsageError, match=r"does not say how it was made"):
        read_texts(tmp_path / "a.png")
