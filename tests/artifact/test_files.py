"""Disk, digests, copies and the write lock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.artifact import files, finite
from flashgen.artifact.files import check_disk, copy, digest, disk_bytes, link, locked, read_json
from flashgen.errors import ArtifactError, MachineError, NumericsError


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda file: None, "cannot be read \\(No such file or directory\\)"),
        (lambda file: file.mkdir(), "is not a plain file"),
        (lambda file: os.mkfifo(file), "is not a plain file"),
        (lambda file: file.symlink_to("/dev/zero"), "is not a plain file"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "is a Git LFS pointer.*git lfs pull"),
        (lambda file: file.write_text("[]"), "cannot be read \\(it is no mapping\\)"),
        (lambda file: file.write_text("[" * 100_000), "cannot be read"),
        (lambda file: file.write_text('{"a": Infinity}'), "cannot be read \\(it holds Infinity\\)"),
        (lambda file: file.open("w").truncate(6 << 30), "cannot be read \\(6442450944 bytes"),
    ],
)
def test_a_small_file_that_is_none_is_one_sentence(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match=f"a.json {why}"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_rights_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch(mode=0)
    with pytest.raises(ArtifactError, match=r"a.json cannot be read \(Permission denied\)"):
        read_json(tmp_path / "a.json")


def test_check_disk_raises_when_the_disk_is_too_small(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(MachineError, match="MiB of disk"):
        check_disk(tmp_path / "not" / "there", 1 << 60)


def test_disk_bytes_are_those_allocated(tmp_path: Path) -> None:
    assert disk_bytes(tmp_path / "none") == 0
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert 100_000 <= disk_bytes(tmp_path) < 1 << 20


def test_a_large_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sha256 = list[Path](), files.sha256

    def counted(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "sha256", counted)
    file, cache = tmp_path / "w", tmp_path / "cache" / "flashgen" / "digests.state"
    file.write_bytes(bytes(files.LARGE_BYTES))
    first = [digest(file) for _ in range(2)]
    assert first == [sha256(file)] * 2 and read == [file]
    link(file, tmp_path / "linked")  # the link changes the inode's time, and not the contents
    assert digest(tmp_path / "linked") == first[0] and read == [file]
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(first[0][:8].encode(), b"00000000"), b"[" * 100_000, b"\xff"):
        cache.write_bytes(damaged)
        read.clear()
        assert digest(file) == first[0] and read == [file]
    when = file.stat().st_mtime_ns
    file.write_bytes(bytes(files.LARGE_BYTES - 1) + b"x")
    os.utime(file, ns=(when, when))  # as a copy that keeps times would
    assert digest(file) == sha256(file) != first[0]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("F16", 0x7C00), ("F16", 0xFE00), ("BF16", 0x7F80), ("BF16", 0xFFC0), ("F32", 0x7F80_0000), ("F64", 0x7FF0 << 48)],
)
def test_weights_that_are_not_finite_name_their_tensor(kind: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "CHUNK_BYTES", 16)
    width = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[kind]

    def write(last: int) -> Path:
        good = (0x3C00 if width == 2 else 1).to_bytes(width, "little")
        ends = {"a.good": [0, 9 * width], "b.bad": [9 * width, 20 * width]}
        header = json.dumps({name: {"dtype": kind, "shape": [9], "data_offsets": span} for name, span in ends.items()}).encode()
        file = tmp_path / "w.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + good * 19 + last.to_bytes(width, "little"))
        return file

    assert digest(write(bits - (1 << (10 if kind == "F16" else 7 if kind == "BF16" else 23 if kind == "F32" else 52))))
    with pytest.raises(NumericsError, match=r"w\.safetensors: tensor b\.bad holds numbers that are not finite"):
        digest(write(bits))
    assert digest(write(bits), expected="that of another file")  # which is said first


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{"])
def test_what_is_no_safetensors_file_is_left_to_its_reader(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    assert digest(tmp_path / "w.safetensors") == files.sha256(tmp_path / "w.safetensors")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert files.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.ENOSYS], ids=["whole", "another disk", "no such call"])
def test_a_copy_has_the_bytes_and_an_inode_of_its_own(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(os.urandom(10_000))
    (tmp_path / "snapshot").symlink_to("source")
    if error is not None:

        def refuse(*_: object) -> int:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    for name in ("source", "snapshot"):
        copy(tmp_path / name, tmp_path / "deep" / "copy")
        assert (tmp_path / "deep" / "copy").read_bytes() == (tmp_path / "source").read_bytes()
        assert not (tmp_path / "deep" / "copy").is_symlink() and not (tmp_path / "deep" / "copy").samefile(tmp_path / "source")


def test_a_copy_ends_where_the_call_copies_short_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system has no copy_file_range")
    (tmp_path / "source").write_bytes(bytes(range(256)) * 10)
    whole = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda reader, writer, count: whole(reader, writer, min(count, 1000)))
    copy(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_full_disk_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_text("weights")
    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        copy(tmp_path / "source", tmp_path / "copy")


def test_link_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").write_text("old")
    link(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").samefile(tmp_path / "source")


# the lock


def test_the_lock_is_free_again_after_any_exception(tmp_path: Path) -> None:
    for error in (ValueError("wrong"), KeyboardInterrupt(), OSError(errno.EIO, "disk")):
        with pytest.raises(type(error)), locked(tmp_path):
            raise error
    with locked(tmp_path):
        pass


def test_a_thread_of_the_same_process_is_refused(tmp_path: Path) -> None:
    outcome: list[str] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                outcome.append("entered")
        except MachineError as error:
            outcome.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(outcome) == 1 and "another process is writing to" in outcome[0] and "give another --out" in outcome[0]
    second()
    assert outcome[1:] == ["entered"]


HOLDER = """
import sys
from collections.abc import Callable
from pathlib import Path
from flashgen.artifact.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(MachineError, match="another process is writing"), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass
