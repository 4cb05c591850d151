"""The file system's side of a version: plain files only, durable writes, one writer at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from flashgen.artifact.finite import check_finite
from flashgen.artifact.manifest import PICKLED
from flashgen.cache import cache_path
from flashgen.errors import ArtifactError, MachineError, is_disk_full

CHUNK_BYTES = 1 << 30
LARGE_BYTES = 1 << 20  # smaller files are read again every time, which takes a millisecond
MOST_DIGESTS = 1000  # of large files that the user's cache remembers
MAX_SMALL_BYTES = 64 << 20  # of a config, an index or a tokenizer; T5's tokenizer.json has 2 MB
LFS = b"version https://git-lfs"
SOURCE = "take the artifact from its source again"


def disk_bytes(folder: Path) -> int:
    """Bytes of disk that the files below `folder` occupy (sparse files count what is allocated); 0 if it does not exist."""
    states = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(getattr(state, "st_blocks", -(-state.st_size // 512)) * 512 for state in states)


def check_disk(out: Path, bytes_needed: int) -> None:
    """Raises MachineError if the disk that holds `out` (which need not exist yet) has fewer free bytes."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise MachineError(
            f"{out} needs {bytes_needed / 2**20:.0f} MiB of disk, {free / 2**20:.0f} MiB are free; free some or give another --out"
        )


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


def check_file(file: Path) -> bytes:
    """First bytes of a plain file. Raises ArtifactError for a file that is missing, cannot be read, is none or a Git LFS pointer."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ArtifactError(f"{file} is not a plain file; {SOURCE}")
        with file.open("rb") as stream:
            first = stream.read(len(LFS))
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}); {SOURCE}") from error
    if first == LFS:
        raise ArtifactError(f"{file} is a Git LFS pointer instead of the file; fetch it in its repository with: git lfs pull")
    return first


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of at most `MAX_SMALL_BYTES`. Raises ArtifactError for anything else."""
    check_file(file)
    try:
        if (size := file.stat().st_size) > MAX_SMALL_BYTES:
            raise ValueError(f"{size} bytes, the limit is {MAX_SMALL_BYTES}")
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); {SOURCE}") from error
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def sha256(file: Path) -> str:
    """sha256 of a file's contents, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(file: Path, expected: str | None = None) -> str:
    """sha256 of a file, for which a large file is read only if the file system reports a change since it was read last.

    Raises NumericsError for weights that are not finite; those of a file whose sha256 is not the `expected` one are not looked at.
    """
    state = _state(file)
    if (known := _known(state)) is not None:
        return known
    found = sha256(file)
    if expected in (None, found):
        check_finite(file)
        _remember(state, found)
    return found


def _state(file: Path) -> list[str | int]:
    """Device and inode, then size, time of modification and time of change, which copying tools cannot set."""
    state = file.stat()
    return [f"{state.st_dev}:{state.st_ino}", state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _known(state: list[str | int]) -> str | None:
    """sha256 that the user's cache has for a large file in this `state`."""
    if int(state[1]) < LARGE_BYTES:
        return None
    entry = _digests().get(state[0])
    return str(entry[-1]) if entry is not None and entry[:-1] == state[1:] else None


def _digests() -> dict[object, list[str | int]]:
    """Entries of the user's cache: [size, times, sha256] by device and inode; nothing if the cache is damaged."""
    try:
        known: dict[object, list[str | int]] = json.loads(read_state(cache_path("digests.state")) or b"{}")
    except (OSError, ArtifactError):
        return {}
    return known


def _remember(state: list[str | int], sha256_hex: str) -> None:
    name, size, *times = state
    if sys.platform == "win32" or int(size) < LARGE_BYTES:  # Windows keeps no time of change
        return
    others = [(key, entry) for key, entry in _digests().items() if key != name]
    known = dict([*others[1 - MOST_DIGESTS :], (name, [size, *times, sha256_hex])])
    file = cache_path("digests.state")
    with suppress(OSError):  # a cache that cannot be written costs time alone
        file.parent.mkdir(parents=True, exist_ok=True)
        write_state(file, json.dumps(known).encode())


def link(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it where links are not possible. Only for files of published versions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    known = _known(_state(source))
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy(source, target)
        return
    if known is not None:
        _remember(_state(target), known)  # a link is a change, but not of the contents


def copy(source: Path, target: Path) -> None:
    """Copy `source` (links resolved) to `target`; file systems with reflinks share the blocks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if hasattr(os, "copy_file_range"):
        try:
            with source.open("rb") as reader, target.open("wb") as writer:
                left = os.fstat(reader.fileno()).st_size
                while left and (done := os.copy_file_range(reader.fileno(), writer.fileno(), min(left, CHUNK_BYTES))):
                    left -= done
            if not left:
                return
        except OSError as error:
            if is_disk_full(error):  # a second way of copying needs the same room
                raise
    shutil.copyfile(source, target)


def make_readable(file: Path) -> None:
    """Give a file the mode of any new file; safetensors writes some for their user alone. Links into another version stay as they are."""
    mask, state = os.umask(0), file.stat()
    os.umask(mask)
    if state.st_nlink == 1 and stat.S_IMODE(state.st_mode) != (mode := 0o666 & ~mask):
        file.chmod(mode)


def point_latest(out: Path, version: str) -> None:
    """Point `latest` at `version` in one step."""
    new = out / ".latest.new"
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(version, target_is_directory=True)
    except (OSError, NotImplementedError):  # no links on this file system
        write_whole(out / "latest", f"{version}\n".encode())
    else:
        os.replace(new, out / "latest")


def write_whole(file: Path, *data: bytes | memoryview) -> None:
    """Write `data` to `file` so that a kill, a full disk or a power failure at any moment leaves the old file or the new one.

    Raises OSError with the name of `file`; no temporary file is left then.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        with temporary.open("wb") as stream:
            for part in data:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        fsync(file.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_state(file: Path, data: bytes | memoryview) -> None:
    """`write_whole` of `data` behind a line with their sha256, for `read_state`."""
    write_whole(file, hashlib.sha256(data).hexdigest().encode() + b"\n", data)


def read_state(file: Path) -> bytes | None:
    """The data that `write_state` wrote; None if there is no `file`. Raises ArtifactError if the file was altered or cut."""
    try:
        digest, _, data = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest != hashlib.sha256(data).hexdigest().encode():
        raise ArtifactError(f"{file} is damaged (its sha256 differs); remove it, then run the same command again")
    return data


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove what a kill inside `write_whole` of files NAME has left in `folder`. Only for the process that holds the folder's lock."""
    for left in folder.glob(f".{name}.tmp"):
        if left.is_file():
            left.unlink()


def fsync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the write lock of `out`, a folder, inside; released on any exception and when the process dies.

    Raises MachineError if another process or thread holds it. File systems without locks are not locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MachineError(f"another process is writing to {out}; wait until it ends, or give another --out") from error
    except NotImplementedError:  # this file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()
