"""Tensors in files: mapped, so that reading some rows reads these alone, and no row stays in this process's memory.

Marks beside the files say which rows are whole: a mark holds the digest of its rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flashgen.artifact.files import read_state, write_state
from flashgen.errors import ArtifactError, MachineError


def map_tensor(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, mmap.mmap]:
    """(tensor of `shape` whose memory is the beginning of `file`, the mapping); a file that is missing or too short grows by zeros.

    Raises MachineError if the disk is full: writing to a mapped file that has no room would end the process without a word.
    """
    size = prod(shape) * dtype.itemsize
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if (before := os.fstat(handle).st_size) < size:
            _grow(handle, before, size)
        memory = mmap.mmap(handle, size)
    except OSError as error:
        mend = "free some disk, or name another one with FLASHGEN_CACHE, then the same command resumes"
        raise MachineError(f"{file} cannot have {size / 2**20:.0f} MiB ({error.strerror}); {mend}") from error
    finally:
        os.close(handle)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape), memory


def _grow(handle: int, before: int, size: int) -> None:
    """Lengthen a file to `size` bytes of disk, where the system can reserve them; the file stays as it is when they are not there."""
    if not hasattr(os, "posix_fallocate"):
        os.truncate(handle, size)
        return
    try:
        os.posix_fallocate(handle, before, size - before)
    except OSError:
        os.truncate(handle, before)
        raise


def release(*mappings: mmap.mmap) -> None:
    """Unmap the pages that were read or written. The file system's cache keeps them while the machine has memory to spare."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for memory in mappings:
            memory.madvise(mmap.MADV_DONTNEED)


def mark_written(mark: Path, names: Sequence[str], rows: slice, tensors: Iterable[Tensor], mappings: Sequence[mmap.mmap]) -> None:
    """Write `mark`, which says that `rows` of the mapped `tensors` are whole and what they hold, after they have got to the disk."""
    for memory in mappings:
        memory.flush()
    write_state(mark, json.dumps([_digest(rows, tensors), *names]).encode())
    release(*mappings)


def read_mark(mark: Path) -> tuple[str, list[str]] | None:
    """(digest of the rows, `names`) of `mark_written`; None if the mark is missing or damaged."""
    try:
        digest, *names = json.loads(read_state(mark) or b"[]") or [""]
    except ArtifactError:
        return None
    return (digest, names) if digest else None


def is_whole(digest: str, rows: slice, tensors: Iterable[Tensor], mappings: Sequence[mmap.mmap]) -> bool:
    """Return True if `rows` of the mapped `tensors` are those that a mark with `digest` was written for."""
    whole = _digest(rows, tensors) == digest
    release(*mappings)
    return whole


def _digest(rows: slice, tensors: Iterable[Tensor]) -> str:
    """sha256 over `rows` of every tensor."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor[rows].flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
