"""Memory and processors of this machine, its container and this process; amounts of memory as text.

A container's limits are those of the control groups that this process is in: its own group and every group above it.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from flashgen.errors import UsageError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
CLEAR_REFS = "/proc/self/clear_refs"


def parse_bytes(text: str) -> float:
    """Bytes of an amount like `900MB` or `1.5GiB`. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"--memory {text}: write a number and a unit, as in --memory 2GB or 900MiB")
    return float(match[1]) * UNITS[match[2].upper()]


def gigabytes(count: float) -> str:
    """`count` bytes as text that `parse_bytes` reads."""
    return f"{count / 1e9:.2f}GB"


def total_bytes() -> int | None:
    """Memory of this machine, or the smallest limit of its container; None where neither is known."""
    limits = [_number(group / name) for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    sizes = [limit for limit in limits if limit is not None]
    with suppress(OSError, psutil.Error):
        sizes.append(int(psutil.virtual_memory().total))
    return min(sizes, default=None)


def cpu_count() -> int:
    """Number of processors that this process may keep busy: its affinity and the quotas of its container, at least 1."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    for group in _groups("cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        with suppress(OSError, ValueError):  # in version 2 only, or "max": no quota
            quota, period = map(int, (group / "cpu.max").read_text().split())
        if quota is not None and period:
            counts.append(quota // period)
    return max(1, min(counts))


def resident_bytes() -> float:
    """Resident memory of this process; where it is unknown, the size of Python with numpy and an engine."""
    with suppress(OSError, psutil.Error):
        return float(psutil.Process().memory_info().rss)
    return 150e6


def peak_rss_mib() -> float | None:
    """Peak resident memory of this process in MiB, or None where it is unknown.

    Linux's is VmHWM: ru_maxrss there starts with the peak of the parent process, which survives exec.
    """
    with suppress(StopIteration, ValueError):
        return round(next(int(line.split()[1]) for line in _lines(Path("/proc/self/status")) if line.startswith("VmHWM")) / 1024, 1)
    if sys.platform == "win32":
        with suppress(OSError, psutil.Error):
            return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024), 1)


class PhasePeaks:
    """Peak resident memory of this process while phases run, in MiB, by the phase's name.

    Linux keeps one peak per process. The peak is read and set back to the present size where a phase begins and ends, so `peak_rss_mib`
    alone no longer knows the peak of the process; `process_mib` does. Where a peak cannot be set back, `mib` stays empty.
    """

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._open: list[str] = []
        self._before = peak_rss_mib() or 0.0
        self._possible = _reset_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the peak of the body; phases may lie within each other."""
        self._read()
        self._open.append(name)
        try:
            yield
        finally:
            self._read()
            self._open.pop()

    def process_mib(self) -> float | None:
        """Peak of the process since it began; None where it is unknown."""
        peak = peak_rss_mib()
        return None if peak is None else max(peak, self._before)

    def _read(self) -> None:
        if not self._possible or (peak := peak_rss_mib()) is None:
            return
        self._before = max(self._before, peak)
        for name in self._open:
            self.mib[name] = max(self.mib.get(name, 0.0), peak)
        _reset_peak()


def _reset_peak() -> bool:
    """Set VmHWM to the present resident size; False where the system cannot."""
    try:
        file = os.open(CLEAR_REFS, os.O_WRONLY)
    except OSError:
        return False
    try:
        return os.write(file, b"5") == 1
    except OSError:
        return False
    finally:
        os.close(file)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that may limit `controller` for this process, of version 1 and 2, from its own group up to the root.

    A container's files lie below the group that the host knows, or at the root: levels that do not exist are listed too.
    """
    for line in _lines(OWN_GROUPS):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number, controllers) == ("0", ""):
            root = GROUPS
        elif controller in controllers.split(","):
            root = GROUPS / controller
        else:
            continue
        own = root / posixpath.normpath(f"/{path}").lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _number(file: Path) -> int | None:
    """The number that `file` holds; None for other text (`max`), for -1 (no limit) and without the file."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []
