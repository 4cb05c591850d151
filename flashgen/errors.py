"""Errors meant for users. Each carries its exit code; the message ends in what mends it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_CODES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
FULL_TEXT = re.compile(r"No space left|File too large|Disk quota exceeded")  # libraries that write files report no number


class FlashgenError(Exception):
    """Base class; the exit code of a plain one says that it is a bug of flashgen."""

    exit_code = 1
    is_shared = False  # whether every process of a launch raises it, so that the first one speaks for all


class UsageError(FlashgenError):
    """Wrong usage, recipe or option value."""

    exit_code = 2


class ArtifactError(FlashgenError):
    """An artifact is missing, broken or of the wrong kind."""

    exit_code = 3


class NumericsError(FlashgenError):
    """NaN, divergence, or parity below its floor."""

    exit_code = 4


class MachineError(FlashgenError):
    """A missing extra, not enough memory or disk."""

    exit_code = 5


@contextmanager
def foreign(wrap: Callable[[str], FlashgenError]) -> Iterator[None]:
    """Turn an error of another library inside into `wrap(its message)`; a panic of a Rust library, which is no Exception, too.

    FlashgenErrors, interrupts, memory that ran out and a full disk pass unchanged.
    """
    try:
        yield
    except BaseException as error:
        passes = is_disk_full(error) or is_out_of_memory(error) or isinstance(error, FlashgenError)
        if passes or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise wrap(one_line(error)) from error


@contextmanager
def disk_named(path: Path) -> Iterator[None]:
    """Turn the error of a full disk inside, which libraries raise without a path, into a MachineError that names `path`."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise MachineError(f"the disk of {path} is full ({one_line(error)}); free some, then the same command resumes") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Return True if `error` reports a full disk, an exhausted quota or the limit on the size of files."""
    if isinstance(error, FlashgenError):
        return False
    return getattr(error, "errno", None) in FULL_CODES or FULL_TEXT.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` reports that memory ran out, on the host or on a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
