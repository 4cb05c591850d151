"""Versioned artifact directories: named, found, and opened with distrust.

out/latest -> v0002        link, or a one-line file where links are not possible
out/v0002/manifest.json    written last, lists every other file
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from flashgen.artifact import manifest as manifests
from flashgen.artifact.files import digest, sha256, walk
from flashgen.artifact.manifest import Manifest, Parent
from flashgen.errors import ArtifactError

VERSION = re.compile(r"v\d{4,}")
MEND = "take the artifact from its source again, or make it again with --force"


@dataclass(frozen=True)
class Artifact:
    """One published version."""

    path: Path
    manifest: Manifest

    def as_parent(self, role: str) -> Parent:
        """This version as an entry of a child's manifest."""
        return Parent(role=role, path=str(self.path.absolute()), digest=self.manifest.digest)

    def verify(self, suffixes: str | tuple[str, ...] = "", folder: str = "") -> None:
        """Compare the contents of the files below `folder` with such names with the manifest. Whoever reads or links files calls it first.

        A large file that passed is read again only if the file system reports a change. Raises ArtifactError for a file that is missing
        or that was altered, and NumericsError for weights that are not finite.
        """
        for file in self.manifest.files:
            if not file.path.startswith(folder) or not file.path.endswith(suffixes):
                continue
            try:
                same = digest(self.path / file.path, file.sha256) == file.sha256
            except OSError as error:
                raise ArtifactError(f"{self.path}: {file.path} cannot be read ({error.strerror}); {MEND}") from error
            if not same:
                altered = "was altered or comes from another artifact (sha256 differs from the manifest's)"
                raise ArtifactError(f"{self.path}: {file.path} {altered}; {MEND}")

    def size_bytes(self) -> int:
        """Bytes of all files, without those in `last/` (other weights, for comparison) and `lora/` (the same weights once more)."""
        return sum(file.size for file in self.manifest.files if not file.path.startswith(("last/", "lora/")))


def resolve(ref: str | Path) -> Path:
    """The version folder of `ref`: DIR (its latest), DIR@v0001, or a version folder. Raises ArtifactError when there is none."""
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
    folders = [p for p in out.iterdir() if VERSION.fullmatch(p.name) and p.is_dir() and not p.is_symlink()] if out.is_dir() else []
    return sorted(folders, key=lambda path: int(path.name[1:]))


def read_latest(out: Path) -> Path | None:
    """Path that `latest` points at, or None when it is absent. Raises ArtifactError when it names no version beside it."""
    link = out / "latest"
    try:
        mode = link.lstat().st_mode
        if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode)):
            raise ArtifactError(f"{link} is neither a link nor a one-line file; remove it and run the stage again")
        if stat.S_ISLNK(mode):
            target = os.readlink(link)
        else:
            with link.open("rb") as file:
                target = file.read(64).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ArtifactError(f"{link} cannot be read ({error.strerror}); remove it and run the stage again") from error
    if out / target not in versions(out):
        raise ArtifactError(f"{link} points at {target!r}, which is no version in {out}; name one as {out}@v0001, or run the stage again")
    return out / target


def open_artifact(ref: str | Path, kinds: tuple[str, ...] | None = None, verify: bool = False) -> Artifact:
    """Open a version whose kind is in `kinds`, checking schema, links and sizes, and with `verify` every digest.

    Raises ArtifactError naming the file at fault.
    """
    path = resolve(ref)
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
    sizes = {name: size for name, size in walk(path) if name != manifests.NAME}
    for file in manifest.files:
        if file.path not in sizes:
            raise ArtifactError(f"{path}: {file.path} is missing; {MEND}")
        if sizes[file.path] != file.size:
            raise ArtifactError(f"{path}: {file.path} has {sizes[file.path]} bytes instead of {file.size}; {MEND}")
        if verify and sha256(path / file.path) != file.sha256:
            raise ArtifactError(f"{path}: {file.path} was altered (sha256 differs from the manifest); {MEND}")
    extra = sorted(sizes.keys() - {file.path for file in manifest.files})
    if verify and extra:
        raise ArtifactError(f"{path}: {extra[0]} is not in the manifest; remove it, or {MEND}")
