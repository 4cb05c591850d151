"""Files that `bench` writes beside bench.json, and its notes on an artifact's files and lineage."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashgen.artifact.files import locked, remove_temporaries
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.errors import ArtifactError, MachineError, UsageError, disk_named
from flashgen.png import texts, write_png
from flashgen.stages.bench_rows import PlannedRow

PICTURES = "pictures"
SCRATCH = "flashgen-bench-"  # beginning of the names of temporary folders


@contextmanager
def output(out: Path | None, baseline: Path | None) -> Iterator[None]:
    """Make the folder `out` and hold its lock inside, so that two benches do not mix their pictures; nothing without `out`.

    Raises UsageError when `out` cannot be written to, or when the report would replace the baseline, and MachineError when another
    process writes there or the disk is full.
    """
    if out is None:
        yield
        return
    if baseline is not None and baseline.resolve() == (out / "bench.json").resolve():
        raise UsageError(f"--out {out} would replace the baseline {baseline}; name another folder")
    try:
        with disk_named(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / ".probe").touch()
            (out / ".probe").unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error
    with locked(out):
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder. Those of benches that were killed, whose locks nobody holds, are removed first."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError, MachineError):
            state = left.lstat()
            is_ours = stat.S_ISDIR(state.st_mode) and (not hasattr(os, "geteuid") or state.st_uid == os.geteuid())
            if is_ours and (left / ".lock").exists():
                with locked(left):
                    shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as folder, locked(Path(folder)):
        yield Path(folder)


def clear_pictures(out: Path) -> None:
    """Remove the pictures of an earlier bench in `out`, and what a kill has left half-written; other files stay."""
    for name in ("bench.json", "contact-sheet.png", "report.html", "report.md"):
        remove_temporaries(out, f"{name}.*")
    for folder in (out / PICTURES).glob("*/"):
        if re.fullmatch(r"\d\d+-.*", folder.name):
            remove_temporaries(folder, "*.png.*")
            for file in folder.glob("*.png"):
                if re.fullmatch(r"\d{4,}", file.stem):
                    file.unlink()


def write_pictures(out: Path, number: int, row: PlannedRow, images: NDArray[np.uint8], prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """Write pictures/NN-name/NNNN.png and return the folder relative to `out`; the text chunks say how to draw each picture again."""
    folder = f"{PICTURES}/{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', row.name).strip('-.') or 'artifact'}"
    (out / folder).mkdir(parents=True, exist_ok=True)
    assert row.source.manifest.sampler is not None
    weight = row.source.manifest.sampler.guidance
    more: dict[str, Any] = {"guidance": weight, "negative": ""} if weight != 1 else {}
    for index, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        write_png(
            out / folder / f"{index:04d}.png", np.asarray(image), texts(prompt, seed, row.job.sigmas, row.source.manifest.digest, **more)
        )
    return folder


def bytes_by_component(source: Artifact) -> dict[str, int]:
    """Bytes of the files that `Artifact.size_bytes` counts, by their folder; those outside of folders are `other`."""
    count = Counter[str]()
    for file in source.manifest.files:
        folder, _, rest = file.path.partition("/")
        if not file.path.startswith(("last/", "lora/")):
            count[folder if rest else "other"] += file.size
    return dict(count)


def lineage(source: Artifact) -> list[dict[str, Any]]:
    """The version and its ancestors as far as they are still where the manifests say, nearest first."""
    return [
        {"stage": m.stage, "path": str(artifact.path), "version": m.version, "digest": m.digest, "seed": m.seed}
        for artifact in _ancestors(source)
        for m in [artifact.manifest]
    ]


def _ancestors(source: Artifact) -> Iterator[Artifact]:
    queue, seen = [source], {source.manifest.digest}
    while queue:
        artifact = queue.pop(0)
        yield artifact
        for parent in artifact.manifest.parents:
            try:
                found = open_artifact(parent.path)
            except ArtifactError:
                continue
            if found.manifest.digest == parent.digest and parent.digest not in seen:
                seen.add(parent.digest)
                queue.append(found)
