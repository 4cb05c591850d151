"""Tensors in files: mapped, so that reading some rows reads these alone, and no row stays in this process's memory."""

from __future__ import annotations

import mmap
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flashgen.artifact.files import fsync


def map_tensor(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, mmap.mmap]:
    """(tensor of `shape` whose memory is the beginning of `file`, the mapping); a file that is missing or too short grows, sparsely."""
    size = prod(shape) * dtype.itemsize
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(handle).st_size < size:
            os.truncate(handle, size)
        memory = mmap.mmap(handle, size)
    finally:
        os.close(handle)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape), memory


def release(*mappings: mmap.mmap) -> None:
    """Unmap the pages that were read or written. The file system's cache keeps them while the machine has memory to spare."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for memory in mappings:
            memory.madvise(mmap.MADV_DONTNEED)


def mark_written(mark: Path, text: str, *mappings: mmap.mmap) -> None:
    """Write `mark`, a file that says that a part of the mapped files is whole, after the part itself has got to the disk."""
    for memory in mappings:
        memory.flush()
    release(*mappings)
    temporary = mark.with_suffix(f".{os.getpid()}.tmp")  # another process may be writing the same part
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, mark)
