"""The file system's side of a version: plain files only, durable writes, one writer at a time."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from flashgen.artifact.manifest import PICKLED
from flashgen.errors import ArtifactError, MachineError

if sys.platform != "win32":
    import fcntl


def disk_bytes(folder: Path) -> int:
    """Bytes of disk that the files below `folder` take; some have holes, and it need not exist."""
    states = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(getattr(state, "st_blocks", -(-state.st_size // 512)) * 512 for state in states)


def walk(path: Path) -> Iterator[tuple[str, int]]:
    """(relative path, size) of every file below `path`. Raises ArtifactError for links, devices and pickled weights."""
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted([*folders, *files]):
            item = Path(folder, name)
            state = item.lstat()
            if stat.S_ISDIR(state.st_mode):
                continue
            relative = item.relative_to(path).as_posix()
            if not stat.S_ISREG(state.st_mode):
                raise ArtifactError(f"{path}: {relative} is a link or a special file; a version holds plain files only, remove it")
            if PICKLED.search(name):
                raise ArtifactError(f"{path}: {relative} may hold pickled code; weights must be safetensors, remove it")
            yield relative, state.st_size


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flip(out: Path, version: str) -> None:
    """Point `latest` at `version` in one step."""
    new = out / ".latest.new"
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(version, target_is_directory=True)
    except (OSError, NotImplementedError):  # no links on this file system
        new.write_text(version + "\n")
        fsync(new)
    os.replace(new, out / "latest")


def fsync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_locks: dict[Path, int] = {}  # held until publish or the end of the process, so that a crash cannot leave one behind


def lock(out: Path) -> None:
    """One process at a time writes to `out`."""
    if sys.platform == "win32" or out.resolve() in _locks:
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise MachineError(f"another process is writing to {out}; wait until it ends, or give another --out") from error
    except OSError:
        pass  # this file system has no locks
    _locks[out.resolve()] = handle


def unlock(out: Path) -> None:
    if out.resolve() in _locks:
        os.close(_locks.pop(out.resolve()))
