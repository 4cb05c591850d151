"""Versioned artifact directories: opened with distrust, published all at once or not at all.

out/latest -> v0002        link, or a one-line file where links are not possible
out/v0002/manifest.json    written last, lists every other file
out/.work/<key>/           resume state of the run with those inputs, recipe and seed
out/.work/staging/         the version being written; worthless after a crash
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from flashgen import __version__
from flashgen.artifact import manifest as manifests
from flashgen.artifact.files import disk_bytes, flip, fsync, lock, sha256, unlock, walk
from flashgen.artifact.manifest import File, Kind, Manifest, Parent, Sampler
from flashgen.errors import ArtifactError, FlashgenError, MachineError, UsageError
from flashgen.processes import rank, wait_for_all
from flashgen.progress import say, warn

EMBEDDED_TEACHER = Path(__file__).resolve().parents[1] / "shapes" / "teacher"
VERSION = re.compile(r"v\d{4,}")
PACKAGES = ("accelerate", "diffusers", "numpy", "onnx", "onnxruntime", "peft", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Artifact:
    """One published version."""

    path: Path
    manifest: Manifest

    def as_parent(self, role: str) -> Parent:
        return Parent(role=role, path=str(self.path.absolute()), digest=self.manifest.digest)

    def size_bytes(self) -> int:
        """Of all files but the second transformer that distill may leave in `last/`, which nothing draws with."""
        return sum(file.size for file in self.manifest.files if not file.path.startswith("last/"))


def resolve(ref: str | Path, kinds: tuple[str, ...] | None = None) -> Path:
    """The version folder that `ref` means: DIR (its latest), DIR@v0001, or a version folder.

    The word `shapes` is the embedded teacher wherever a teacher will do; a folder of that name is `./shapes`.
    """
    if ref == "shapes" and (kinds is None or "teacher" in kinds):
        return EMBEDDED_TEACHER
    path = Path(ref)
    name, at, version = str(ref).rpartition("@")
    if at and not path.exists():
        if Path(name) / version in versions(Path(name)):
            return Path(name) / version
        raise ArtifactError(f"no version {version} in {name}; there are: {', '.join(v.name for v in versions(Path(name))) or 'none'}")
    if (path / manifests.NAME).is_file():
        return path.resolve() if path.is_symlink() else path  # DIR/latest must not move under its reader
    latest = read_latest(path)
    if latest is not None:
        return latest
    if (path / "model_index.json").is_file() or not path.exists():
        what = f"{path} is a plain diffusers folder" if path.exists() else f"no artifact at {path}"
        raise ArtifactError(
            f"{what}; check the path, or bring a diffusers folder or hub id in with: flashgen teacher import {ref} --out DIR"
        )
    raise ArtifactError(f"{path} holds no finished version; run the stage that writes it (flashgen STAGE ... --out {path})")


def versions(out: Path) -> list[Path]:
    """Published versions, oldest first."""
    found = [p for p in out.iterdir() if VERSION.fullmatch(p.name) and p.is_dir() and not p.is_symlink()] if out.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[1:]))


def read_latest(out: Path) -> Path | None:
    """What `latest` points at, or None when it is absent. Raises ArtifactError when it names no version beside it."""
    link = out / "latest"
    try:
        target = os.readlink(link) if link.is_symlink() else link.read_bytes()[:64].decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ArtifactError(f"{link} is neither a link nor a one-line file; remove it and run the stage again") from error
    if out / target not in versions(out):
        raise ArtifactError(f"{link} points at {target!r}, which is no version in {out}; name one as {out}@v0001, or run the stage again")
    return out / target


def open_artifact(ref: str | Path, kinds: tuple[str, ...] | None = None, verify: bool = False) -> Artifact:
    """Open a version whose kind is in `kinds`, checking schema, links and sizes, and with `verify` every digest.

    Raises ArtifactError naming the file at fault.
    """
    path = resolve(ref, kinds)
    manifest = manifests.parse(_read_manifest(path), str(path / manifests.NAME))
    if kinds is not None and manifest.kind not in kinds:
        raise ArtifactError(f"{path} is a {manifest.kind}, this needs a {' or '.join(kinds)}; give the path of one")
    _check_files(path, manifest, verify)
    return Artifact(path, manifest)


def _read_manifest(path: Path) -> bytes:
    file = path / manifests.NAME
    try:
        state = file.lstat()
        if not stat.S_ISREG(state.st_mode):
            raise ArtifactError(f"{file} is not a plain file; take the artifact from its source again")
        if state.st_size > manifests.MAX_BYTES:
            raise ArtifactError(
                f"{file} has {state.st_size} bytes, the limit is {manifests.MAX_BYTES}; take the artifact from its source again"
            )
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}); run the stage that writes it") from error


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    mend = "take the artifact from its source again, or make it again with --force"
    sizes = {name: size for name, size in walk(path) if name != manifests.NAME}
    for file in manifest.files:
        if file.path not in sizes:
            raise ArtifactError(f"{path}: {file.path} is missing; {mend}")
        if sizes[file.path] != file.size:
            raise ArtifactError(f"{path}: {file.path} has {sizes[file.path]} bytes instead of {file.size}; {mend}")
        if verify and sha256(path / file.path) != file.sha256:
            raise ArtifactError(f"{path}: {file.path} was altered (sha256 differs from the manifest); {mend}")
    extra = sorted(sizes.keys() - {file.path for file in manifest.files})
    if verify and extra:
        raise ArtifactError(f"{path}: {extra[0]} is not in the manifest; remove it, or {mend}")


def check_disk(out: Path, bytes_needed: int) -> None:
    """Raises MachineError when the disk that holds `out` (which need not exist yet) has fewer free bytes."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise MachineError(
            f"{out} needs {bytes_needed / 2**20:.0f} MiB of disk, {free / 2**20:.0f} MiB are free; free some or give another --out"
        )


@dataclass(frozen=True)
class Draft:
    """A version being made. Fill `path`, keep resume state in `work`, then `publish`."""

    out: Path
    path: Path
    work: Path
    key: str
    fields: dict[str, Any]

    def link(self, source: Path, name: str) -> None:
        """Hard-link `source` (or copy it, where links are not possible) to `name` in the version."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        source = source.resolve()  # hub caches hold links; a version must not
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    def link_tree(self, source: Path, name: str) -> None:
        """Link every file below `source` to the same place below `name`."""
        if not source.is_dir():
            raise ArtifactError(f"{source} is missing; take the artifact from its source again")
        for folder, _, files in os.walk(source):
            for file in files:
                self.link(Path(folder, file), str(Path(name, Path(folder).relative_to(source), file)))

    def publish(
        self, sampler: Sampler | None = None, metrics: Mapping[str, Any] | None = None, extra: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Digest, fsync and rename into `out`, then flip `latest`; a kill in between leaves the previous version whole."""
        if rank():
            shutil.rmtree(self.path)
            wait_for_all()
            wait_for_all()
            return open_artifact(self.out)
        wait_for_all()  # all are done writing
        known = _digests(self.fields["parents"])
        files = [
            File(path=name, size=size, sha256=known.get(_identity(self.path / name)) or sha256(self.path / name))
            for name, size in walk(self.path)
            if name != manifests.NAME
        ]
        found = versions(self.out)
        manifest = Manifest(
            **self.fields,
            version=f"v{int(found[-1].name[1:]) + 1 if found else 1:04d}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            flashgen_version=__version__,
            packages=_packages(),
            sampler=sampler,
            metrics=_plain(metrics),
            extra={**_plain(extra), "key": self.key},
            files=files,
        ).sealed()
        (self.path / manifests.NAME).unlink(missing_ok=True)  # it may be a link into another version
        (self.path / manifests.NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in (*names, ""):
                fsync(Path(folder, name))
        final = self.out / manifest.version
        os.rename(self.path, final)
        fsync(self.out)
        flip(self.out, manifest.version)
        fsync(self.out)
        shutil.rmtree(self.work)
        if not any(self.work.parent.iterdir()):
            self.work.parent.rmdir()
        unlock(self.out)
        wait_for_all()
        return Artifact(final, manifest)


def begin(
    out: str | Path,
    *,
    kind: Kind,
    stage: str,
    recipe: dict[str, Any],
    seed: int,
    parents: Sequence[Parent],
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Draft | Artifact:
    """Start, or resume, a version of `out`. Returns the latest one, unopened work to do, when it was made of the same
    inputs, recipe and seed (unless `force`). Everything that changes the result must be in `recipe`.

    `check` sees the folder of the resume state, which need not be there, before anything is made; what it raises is raised.
    Raises UsageError when `out` cannot hold an artifact and MachineError while another process writes to it.
    """
    out = Path(out)
    if (out / manifests.NAME).exists() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out} is a {'file' if out.is_file() else 'published version'}; name a folder that may hold versions")
    key = manifests.hash_json([stage, kind, recipe, seed, [(p.role, p.digest) for p in parents], __version__])
    if rank():  # process 0 has the lock; what this one writes is thrown away
        wait_for_all()
        if not force and (done := _up_to_date(out, key)):
            return done
        staging = out / ".work" / f"staging-{rank()}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        return Draft(out, staging, out / ".work" / key[:16], key, {})
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if not force and (done := _up_to_date(out, key)):
        unlock(out)
        wait_for_all()
        return done
    staging, work = out / ".work" / "staging", out / ".work" / key[:16]
    if check:
        try:
            check(work)
        except FlashgenError:
            unlock(out)
            if made:
                out.rmdir()
            raise
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    if work.exists():
        say(f"{stage}: resuming from {work}")
    elif others := {path.parent for path in work.parent.glob("[0-9a-f]*/*")}:
        size = sum(map(disk_bytes, others)) / 2**20
        say(f"{work.parent} keeps {len(others)} unfinished runs with other settings, {size:.0f} MiB; remove what you will not resume")
    work.mkdir(exist_ok=True)
    wait_for_all()
    fields = {"kind": kind, "stage": stage, "recipe": recipe, "seed": seed, "parents": list(parents)}
    return Draft(out, staging, work, key, fields)


def _up_to_date(out: Path, key: str) -> Artifact | None:
    try:
        latest = read_latest(out)
        if latest is None:
            return None
        artifact = open_artifact(latest)
    except ArtifactError as error:
        warn(f"{error}. Making a new version")
        return None
    if artifact.manifest.extra.get("key") != key:
        return None
    say(f"{artifact.path} is up to date (--force makes a new version)")
    return artifact


def _identity(path: Path) -> tuple[int, int, int]:
    """Of the file itself, whatever its name."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_mtime_ns


def _digests(parents: Sequence[Parent]) -> dict[tuple[int, int, int], str]:
    """What the parents' manifests say about files that a child may have linked: gigabytes that need no second reading."""
    known = {}
    for parent in parents:
        folder = Path(parent.path)
        if (folder / manifests.NAME).is_file():
            for file in manifests.parse(_read_manifest(folder), str(folder / manifests.NAME)).files:
                known[_identity(folder / file.path)] = file.sha256
    return known


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """JSON types only; numpy scalars become floats."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(data or {}), default=float))
    return plain
