"""Memory and processors of the machine, its container and this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashgen.errors import UsageError
from flashgen.runtime import memory
from flashgen.runtime.memory import cpu_count, gigabytes, parse_bytes, peak_rss_mib, resident_bytes, total_bytes

GIB = 2**30


def test_bytes_have_a_unit() -> None:
    assert [parse_bytes(text) for text in ("2GB", "900mb", "1.5GiB")] == [2e9, 9e8, 1.5 * 2**30]
    assert parse_bytes(gigabytes(1.5e9)) == 1.5e9
    for text in ("", "2", "GB", "-2GB", "2TB", "2 GB each", "9" * 5000 + "GB"):
        with pytest.raises(UsageError, match=r"--memory .*as in --memory 2GB"):
            parse_bytes(text)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of control groups without limits, on a machine of 64 GiB and 16 processors."""
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    return tmp_path / "groups"


def write(root: Path, own: str, files: dict[str, str]) -> None:
    (root.parent / "cgroup").write_text(own)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_limits_of_version_2_are_the_smallest_up_to_the_root(groups: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/memory.max": f"{8 * GIB}\n", "memory.max": f"{16 * GIB}\n", "other/memory.max": "1\n"}
    write(groups, "0::/a/b\n", files | {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "450000 100000\n"})
    assert (total_bytes(), cpu_count()) == (8 * GIB, 4)


def test_limits_of_version_1_are_found_below_their_controllers(groups: Path) -> None:
    no_limit = "9223372036854771712\n"
    files = {"memory/d/memory.limit_in_bytes": f"{3 * GIB}\n", "memory/memory.limit_in_bytes": no_limit}
    files |= {"cpu/d/cpu.cfs_quota_us": "-1\n", "cpu/d/cpu.cfs_period_us": "100000\n"}
    files |= {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    write(groups, "7:cpu,cpuacct:/d\n4:memory:/d\n0::/\n", files)
    assert (total_bytes(), cpu_count()) == (3 * GIB, 1)  # half a processor is one thread


def test_container_that_sees_the_hosts_path_has_its_limits_at_the_root(groups: Path) -> None:
    write(groups, "4:memory:/docker/abc\n3:cpu:/../../x\n", {"memory/memory.limit_in_bytes": f"{2 * GIB}\n"})
    assert (total_bytes(), cpu_count()) == (2 * GIB, 12)


@pytest.mark.parametrize("own", ["", "nonsense\n0:\n::\n", "0::/a\n"])
def test_machine_without_limits_counts_as_a_whole(own: str, groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(groups, own, {"a/memory.max": "what\n", "a/cpu.max": "what\n"})
    assert (total_bytes(), cpu_count()) == (64 * GIB, 12)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1

    def fail() -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert total_bytes() is None


def test_peak_is_that_of_this_process_alone() -> None:
    """A small child of a large parent has a small peak: ru_maxrss would be the parent's on Linux."""
    block = bytearray(os.urandom(1 << 20)) * 300
    assert resident_bytes() > len(block)
    code = "from flashgen.runtime.memory import peak_rss_mib, resident_bytes; print(peak_rss_mib(), resident_bytes() / 2**20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, resident = map(float, done.stdout.split())
    assert 5 < resident < peak + 1 and peak < 200
    assert (peak_rss_mib() or 0) > 300
