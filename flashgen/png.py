"""PNG files with text chunks for the way they were made. The same picture and texts give the same bytes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flashgen
from flashgen.artifact.files import write_whole
from flashgen.errors import UsageError
from flashgen.pixels import Size


def texts(prompt: str, seed: int, sigmas: Sequence[float], digest: str, **more: object) -> dict[str, str]:
    """Text chunks of a generated picture; `more` are options that differ from the artifact's sampler."""
    values = {"prompt": prompt, "seed": seed, "sigmas": json.dumps([round(s, 9) for s in sigmas]), "artifact": digest}
    return {k: str(v) for k, v in (values | {"flashgen": flashgen.__version__} | more).items()}


def sheet(images: NDArray[np.uint8], columns: int = 0) -> NDArray[np.uint8]:
    """One picture of `images` [N, H, W, 3] on white, row by row with `columns` per row; 0: about as many columns as rows."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    _, height, width, _ = images.shape
    page = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = height * (i // columns), width * (i % columns)
        page[top : top + height, left : left + width] = image
    return page


def read_texts(path: Path) -> dict[str, Any]:
    """Options of `generate` for a picture that it wrote: prompt, seed, sigmas, artifact (a digest), size_px, guidance and negative.

    Raises UsageError for other files.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            size_px = Size(image.height, image.width)
            chunks = dict(image.text)  # type: ignore[attr-defined]  # PNG images have it, and `formats` admits no others
        sigmas = [float(sigma) for sigma in json.loads(chunks["sigmas"])]
        options = {"prompt": chunks["prompt"], "seed": int(chunks["seed"]), "sigmas": sigmas, "artifact": chunks["artifact"]}
        start = {"init_image": chunks["init_image"]} if "init_image" in chunks else {}
        return options | {"size_px": size_px, "guidance": float(chunks.get("guidance", 1)), "negative": chunks.get("negative", "")} | start
    except OSError as error:
        raise UsageError(f"--from-png {path} is no PNG that can be read ({error}); give a picture of flashgen generate") from error
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise UsageError(f"--from-png {path} does not say how it was made ({error!r}); give a picture of flashgen generate") from error


def is_whole(path: Path) -> bool:
    """Return True if `path` is a PNG file whose every chunk has the checksum that it was written with."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def write_png(path: Path, image: NDArray[np.uint8], chunks: dict[str, str]) -> None:
    """Write `image` [H, W, 3] with text `chunks`, completely or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, value)
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info, compress_level=6)
    write_whole(path, buffer.getbuffer())
