"""Disk, digests, copies and the write lock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.artifact import files
from flashgen.artifact.files import check_disk, copy, disk_bytes, link, locked, read_json
from flashgen.errors import ArtifactError, MachineError


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
