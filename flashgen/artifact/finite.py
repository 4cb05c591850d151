"""The check that weights are finite, for any safetensors file, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flashgen.errors import NumericsError

# Floating-point types: an integer of their width, and the bits of the exponent, which are all 1 in infinities and NaN and nowhere else.
EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000), "F64": ("<u8", 0x7FF0 << 48)}
CHUNK_BYTES = 1 << 22
MAX_HEADER_BYTES = 100 << 20  # the format's own limit


def check_finite(file: Path) -> None:
    """Raises NumericsError naming the first tensor of a safetensors file that holds NaN or an infinity.

    Other files are not looked at, and neither are broken safetensors files: whoever loads one says what is wrong with it.
    """
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        if head > MAX_HEADER_BYTES:
            return
        try:
            header = json.loads(stream.read(head))
            entries = {name: (entry["dtype"], *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        for name, (dtype, low, high) in entries.items():
            if dtype not in EXPONENTS:
                continue
            kind, exponent = np.dtype(EXPONENTS[dtype][0]), EXPONENTS[dtype][1]
            stream.seek(8 + head + low)
            for start in range(low, high, CHUNK_BYTES):
                data = stream.read(min(CHUNK_BYTES, high - start))
                bits = np.frombuffer(data, kind, len(data) // kind.itemsize)
                if bits.size and (bits & kind.type(exponent)).max() == exponent:
                    raise NumericsError(
                        f"{file}: tensor {name} holds numbers that are not finite (NaN or infinity); take it from its source again, or "
                        "train or convert it again"
                    )
