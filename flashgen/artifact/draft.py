"""Making a version: written beside the published ones, then published all at once or not at all.

out/.lock                  held by the process that writes
out/.work/<key>/           resume state of the run with those inputs, settings and seed
out/.work/v0001/checkpoints/  of the run that made that version, where `checkpoint.keep` is 2 or more; `generate` draws from them
out/.work/staging/         the version being written; worthless after a crash
out/.work/cache/<name>/    what runs share: embeddings of prompts, trajectories; FLASHGEN_CACHE names another folder for them
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from flashgen import __version__
from flashgen.artifact import manifest as manifests
from flashgen.artifact.files import digest, disk_bytes, fsync, link, make_readable, point_latest, remove_temporaries, walk
from flashgen.artifact.manifest import File, Kind, Manifest, Parent, Sampler
from flashgen.artifact.store import Artifact, open_artifact, read_latest, versions
from flashgen.errors import ArtifactError, UsageError, disk_named
from flashgen.progress import say, warn

CHECKPOINTS = "checkpoints"  # folder of the trainings' checkpoints in the resume state
TENSORBOARD = "tensorboard"  # that of their logs
PACKAGES = ("accelerate", "diffusers", "numpy", "onnx", "onnxruntime", "peft", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Origin:
    """Stage, inputs and settings of a version. Their hash is the key by which a run is resumed or found to be up to date."""

    kind: Kind
    stage: str
    family: str
    world: str | None
    settings: dict[str, Any]  # everything in the recipe that changes the result
    seed: int
    parents: Sequence[Parent]

    def key(self) -> str:
        """sha256 over everything that changes the result. A patch release of flashgen does not change it."""
        release = ".".join(__version__.split(".")[:2])
        parents = [(parent.role, parent.digest) for parent in self.parents]
        return manifests.hash_json([self.stage, self.kind, self.settings, self.seed, parents, release])


@dataclass(frozen=True)
class Draft:
    """A version being made: fill `path`, keep resume state in `work`, then `publish`."""

    out: Path
    path: Path
    work: Path
    origin: Origin

    @property
    def cache(self) -> Path:
        """Folder of what runs share (`cache_folder`)."""
        return cache_folder(self.out)

    def link_tree(self, source: Path, name: str) -> None:
        """Hard-link every file below `source`, a folder of a published version, to the same place below `name`."""
        if not source.is_dir():
            raise ArtifactError(f"{source} is missing; take the artifact from its source again")
        for folder, _, files in os.walk(source):
            for file in files:
                link(Path(folder, file), self.path / name / Path(folder).relative_to(source) / file)

    def publish(
        self,
        sampler: Sampler | None = None,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        *,
        keep_checkpoints: bool = False,
    ) -> Artifact:
        """Digest, fsync and rename into `out`, then move `latest`; a kill in between leaves the previous version whole.

        Every file is read, but for linked ones that `Artifact.verify` has read and that have not changed since. The resume state is
        removed; with `keep_checkpoints` its checkpoints move to `.work/VERSION`. Raises NumericsError for weights that are not finite.
        """
        sizes = {name: size for name, size in walk(self.path) if name != manifests.NAME}
        for name in sizes:
            make_readable(self.path / name)
        files = [File(path=name, size=size, sha256=digest(self.path / name)) for name, size in sizes.items()]
        before = versions(self.out)
        manifest = Manifest(
            kind=self.origin.kind,
            stage=self.origin.stage,
            family=self.origin.family,
            world=self.origin.world,
            recipe=self.origin.settings,
            seed=self.origin.seed,
            parents=list(self.origin.parents),
            version=f"v{int(before[-1].name[1:]) + 1 if before else 1:04d}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            flashgen_version=__version__,
            packages=_packages(),
            sampler=sampler,
            metrics=_plain(metrics),
            extra={**_plain(extra), "key": self.origin.key()},
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
        point_latest(self.out, manifest.version)
        fsync(self.out)
        kept = self.work.parent / manifest.version
        shutil.rmtree(kept, ignore_errors=True)  # of a version with that number that was removed
        for name in [CHECKPOINTS, TENSORBOARD] if keep_checkpoints else [TENSORBOARD]:
            if (self.work / name).exists():
                kept.mkdir(exist_ok=True)
                os.rename(self.work / name, kept / name)
        os.rename(self.work, self.path)  # a kill while files are removed leaves no half of a resume state
        shutil.rmtree(self.path)
        if not any(self.work.parent.iterdir()):
            self.work.parent.rmdir()
        return Artifact(final, manifest)


def check_out(out: Path) -> None:
    """Raises UsageError when `out` cannot hold versions."""
    if (out / manifests.NAME).exists() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out} is a {'file' if out.is_file() else 'published version'}; name a folder that may hold versions")
    latest = out / "latest"
    if latest.exists() and not (latest.is_symlink() or latest.is_file()):
        raise UsageError(f"{latest} is neither a link nor a file, so it could not be pointed at a new version; remove it")


def up_to_date(out: Path, origin: Origin) -> Artifact | None:
    """The latest version in `out` if it was made from the same inputs, settings and seed, else None."""
    try:
        latest = read_latest(out)
        artifact = None if latest is None else open_artifact(latest)
    except ArtifactError as error:
        warn(f"{error}. Making a new version")
        return None
    if artifact is None or artifact.manifest.extra.get("key") != origin.key():
        return None
    say(f"{artifact.path} is up to date (--force makes a new version)")
    return artifact


def work_folder(out: Path, origin: Origin) -> Path:
    """Where the resume state of a run lies, whether or not it exists."""
    return out / ".work" / origin.key()[:16]


def cache_folder(out: Path) -> Path:
    """Where runs that write to `out` keep what depends on less than all of their settings; FLASHGEN_CACHE, or .work/cache in `out`.

    Each folder in it is named after what its contents depend on, outlives the run, and may be deleted when no run is writing.
    """
    shared = os.environ.get("FLASHGEN_CACHE")
    return Path(shared) if shared else out / ".work" / "cache"


def begin(out: Path, origin: Origin) -> Draft:
    """Start a version in `out`, or resume one: an empty staging folder, and the resume state of an earlier run if there is any."""
    staging, work = out / ".work" / "staging", work_folder(out, origin)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    if work.exists():
        say(f"{origin.stage}: resuming from {work}")
    elif others := {path.parent for path in work.parent.glob(f"{'[0-9a-f]' * 16}/*")}:
        size = sum(map(disk_bytes, others)) / 2**20
        say(f"{work.parent} keeps {len(others)} unfinished runs with other settings, {size:.0f} MiB; remove what you will not resume")
    work.mkdir(exist_ok=True)
    for folder in (work, work / CHECKPOINTS):
        remove_temporaries(folder)
    return Draft(out, staging, work, origin)


@contextmanager
def begun(out: Path, origin: Origin) -> Iterator[Draft]:
    """`begin`; after an error the draft's files are removed, since they would keep a full disk full. The resume state stays.

    Raises MachineError with the path for a full disk.
    """
    draft = begin(out, origin)
    with disk_named(out):
        try:
            yield draft
        except Exception:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise


def _packages() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = package_version(name)
        except PackageNotFoundError:
            continue
    return installed


def _plain(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """`data` as JSON types only; numpy scalars become floats."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(data or {}), default=float))
    return plain
