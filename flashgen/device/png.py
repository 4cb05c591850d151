"""PNG files that say how they were made; the same picture and texts give the same bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flashgen
from flashgen.errors import UsageError


def texts(prompt: str, seed: int, sigmas: Sequence[float], digest: str, **more: object) -> dict[str, str]:
    """The text chunks of a generated picture; `more` holds what differs from the artifact's own sampler."""
    values = {"prompt": prompt, "seed": seed, "sigmas": json.dumps([round(s, 9) for s in sigmas]), "artifact": digest}
    return {k: str(v) for k, v in (values | {"flashgen": flashgen.__version__} | more).items()}


def sheet(images: NDArray[np.uint8], columns: int = 0) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3] side by side on white, row after row, about as many rows as columns where no number is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    _, height, width, _ = images.shape
    found = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = height * (i // columns), width * (i % columns)
        found[top : top + height, left : left + width] = image
    return found


def read_texts(path: Path) -> dict[str, Any]:
    """How a picture of `generate` was made: prompt, seed, sigmas, artifact (a digest), size_px, guidance and negative.

    Raises UsageError for a file that is no such picture.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            size_px = image.width
            found = dict(image.text)  # type: ignore[attr-defined]  # a PNG's alone, and `formats` lets no other through
        sigmas = [float(sigma) for sigma in json.loads(found["sigmas"])]
        made = {"prompt": found["prompt"], "seed": int(found["seed"]), "sigmas": sigmas, "artifact": found["artifact"], "size_px": size_px}
        start = {"init_image": found["init_image"]} if "init_image" in found else {}
        return made | {"guidance": float(found.get("guidance", 1)), "negative": found.get("negative", "")} | start
    except OSError as error:
        raise UsageError(f"--from-png {path} is no PNG that can be read ({error})") from error
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise UsageError(f"--from-png {path} does not say how it was made ({error!r}); give a picture of flashgen generate") from error


def write_png(path: Path, image: NDArray[np.uint8], chunks: dict[str, str]) -> None:
    """Write uint8 [H, W, 3] with text `chunks`, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info, compress_level=6)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
