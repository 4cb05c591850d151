"""Pictures as arrays: their size, their conversion to and from network values, and slices of a batch of them."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from flashgen.errors import NumericsError

Floats = NDArray[np.float32]
MAX_SIDE_PX = 1 << 15


class Size(NamedTuple):
    """Height and width of a picture in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """`512` for a square, else `WIDTHxHEIGHT`."""
        return str(self.width) if self.height == self.width else f"{self.width}x{self.height}"


def read_size(value: object) -> Size:
    """Size of `512`, `"512"`, `"768x512"` (width x height) or a `Size`.

    Raises ValueError for anything else and for sides outside 1..32768 px.
    """
    if isinstance(value, Size):
        size = value
    else:
        match = re.fullmatch(r"(\d{1,6})(?:\s*[xX]\s*(\d{1,6}))?", str(value).strip()) if isinstance(value, int | str) else None
        if match is None:
            raise ValueError(f"{value!r} is not a picture size; write 512 for a square, or WIDTHxHEIGHT as in 768x512")
        size = Size(int(match[2] or match[1]), int(match[1]))
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise ValueError(f"picture sides must be 1 to {MAX_SIDE_PX} px, not {size}")
    return size


def _plain(size: Size) -> int | str:
    return size.height if size.height == size.width else str(size)


SizePx = Annotated[
    Size,
    BeforeValidator(read_size),
    PlainSerializer(_plain, return_type=int | str),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]}),
]


def require_finite(is_finite: bool, of: str) -> None:
    """Raises NumericsError unless `is_finite`: whether all numbers are that the network `of` gives."""
    if not is_finite:
        raise NumericsError(
            f"{of} gives numbers that are not finite (NaN or infinity), so there is no picture; its weights are damaged or its numbers "
            "overflow: take the artifact from its source again, or make it again with --force"
        )


def to_uint8(sample: Floats) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of decoder output [B, 3, H, W] in [-1, 1], rounded as diffusers rounds.

    Raises NumericsError for numbers that are not finite: every picture passes here.
    """
    require_finite(bool(np.isfinite(sample).all()), "the decoder (vae)")
    return np.asarray(np.round(np.clip(sample / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255), np.uint8)


def from_uint8(picture: NDArray[np.uint8]) -> Floats:
    """VAE encoder input [1, 3, H, W] in [-1, 1] of a picture [H, W, 3]."""
    return (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def slices(count: int, batch: int) -> list[slice]:
    """Consecutive slices of `batch` rows (the last one may be shorter) that cover `count` rows."""
    return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]
