from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flashgen.device.png import texts, write_png


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
