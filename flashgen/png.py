"""Picture files: reading any, and writing PNG with text chunks for the way they were made.

The same picture and texts give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

import flashgen
from flashgen.artifact.files import write_whole
from flashgen.errors import UsageError
from flashgen.pixels import Size

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # of a picture that is read, 200 MB; Pillow warns from 89 million
MAX_TEXT = 1 << 16  # characters of a text chunk


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


@contextmanager
def opened(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """A picture file of one of Pillow's `formats`; only its header has been read. Every picture that flashgen reads is opened here.

    Nothing of Pillow's reaches stderr. Raises ValueError, inside too, for what cannot be read: other formats, more than `MAX_PIXELS`,
    and files that are cut, broken or lie about their size.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} are more than {MAX_PIXELS} pixels; make it smaller")
                yield image
    except (OSError, ValueError):
        raise
    except (SyntaxError, TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error, EOFError, AttributeError) as error:
        raise ValueError(f"broken file: {error}") from error  # Pillow's decoders raise any of these
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def read_picture(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> NDArray[np.uint8]:
    """The picture [H, W, 3] of a file: turned upright by its EXIF data, on white where it is transparent, 16 bits scaled to 8.

    Raises ValueError and OSError as `opened` does.
    """
    from PIL import Image, ImageOps

    with opened(file, formats) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # grey of 16 bits; Pillow's own conversion cuts at 255
            grey = np.asarray(image, np.int64)
            image = Image.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def fit(picture: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """The largest centred part of `picture` [h, w, 3] with the proportions of `size`, resized to [H, W, 3] (LANCZOS)."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(picture), (size.width, size.height), Image.Resampling.LANCZOS))


def read_texts(path: Path) -> dict[str, Any]:
    """Options of `generate` for a picture that it wrote: prompt, seed, sigmas, artifact (a digest), size_px, guidance and negative.

    Raises UsageError for other files.
    """
    try:
        with opened(path, ("PNG",)) as image:
            size_px = Size(image.height, image.width)
            chunks = {key: text for key, text in image.info.items() if isinstance(text, str)}  # those before the pixels, which stay unread
    except (OSError, ValueError) as error:
        raise UsageError(f"--from-png {path} is no PNG that can be read ({error}); give a picture of flashgen generate") from error
    try:
        if long := next((key for key, text in chunks.items() if len(text) > MAX_TEXT), None):
            raise ValueError(f"{long[:64]} has {len(chunks[long])} characters")
        sigmas = [float(sigma) for sigma in json.loads(chunks["sigmas"])]
        options = {"prompt": chunks["prompt"], "seed": int(chunks["seed"]), "sigmas": sigmas, "artifact": chunks["artifact"]}
        start = {"init_image": chunks["init_image"]} if "init_image" in chunks else {}
        return options | {"size_px": size_px, "guidance": float(chunks.get("guidance", 1)), "negative": chunks.get("negative", "")} | start
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"--from-png {path} does not say how it was made ({error!r}); give a picture of flashgen generate") from error


def is_whole(path: Path) -> bool:
    """Return True if `path` is a PNG file whose every chunk has the checksum that it was written with."""
    try:
        with opened(path, ("PNG",)) as image:
            image.verify()
    except (OSError, ValueError):
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
