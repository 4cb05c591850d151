"""PNG files that say how they were made; the same picture and texts give the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import flashgen


def texts(prompt: str, seed: int, sigmas: Sequence[float], digest: str, **more: object) -> dict[str, str]:
    """The text chunks of a generated picture; `more` holds what differs from the artifact's own sampler."""
    values = {"prompt": prompt, "seed": seed, "sigmas": json.dumps([round(s, 9) for s in sigmas]), "artifact": digest}
    return {k: str(v) for k, v in (values | {"flashgen": flashgen.__version__} | more).items()}


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
