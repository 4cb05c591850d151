"""manifest.json: what a version holds, where it comes from and how it is sampled."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashgen.errors import ArtifactError
from flashgen.pixels import SizePx

SCHEMA_VERSION = 1
MAX_BYTES = 8 << 20  # of a manifest; a hostile one must not fill the memory
MAX_TOKENS, MAX_STEPS = 4096, 1000  # of a sampler
NAME = "manifest.json"
NAME_PATTERN = r"^[a-z][a-z0-9_-]{0,63}$"  # of families and worlds
PICKLED = re.compile(r"(?i)\.(pt|pth|ckpt|pkl|pickle|joblib)$|pytorch_model.*\.bin$")  # formats that run code when loaded

Kind = Literal["teacher", "student", "quantized", "device", "gguf"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Parent(_Strict):
    """An input of the stage that made the version."""

    role: str = Field(min_length=1)
    path: str
    digest: Sha256


class File(_Strict):
    """One file of the version; `path` is relative, with forward slashes."""

    path: str
    size: int = Field(ge=0)
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_inside(self) -> Self:
        path = PurePosixPath(self.path)
        hostile = path.is_absolute() or ".." in path.parts or any(c in self.path for c in "\\:\0") or str(path) != self.path
        if hostile or self.path in (".", NAME):
            raise ValueError(f"path {self.path!r} is not a plain relative path inside the version")
        if PICKLED.search(self.path):
            raise ValueError(f"file {self.path!r} may hold pickled code; weights must be safetensors")
        return self


class Sampler(_Strict):
    """How pictures are drawn. `sigmas` are final (already shifted), fall strictly, and end with 0.

    Manifests of flashgen 0.1 and 0.2 have one field per token length, `clip_tokens` and `t5_tokens`; they become entries of `tokens`.
    """

    sigmas: list[float] = Field(min_length=2, max_length=MAX_STEPS + 1)
    shift: float = Field(gt=0, le=1e4)
    guidance: float = Field(ge=1, le=1000, description="1 for students: none")
    prediction: Literal["velocity"] = "velocity"
    encoder: Literal["full", "zeros", "prune", "compact"] = "full"
    tokens: dict[str, Annotated[int, Field(ge=0, le=MAX_TOKENS)]] = Field(description="text tokens by the family's label; 0: pruned")
    size_px: SizePx
    trained_steps: list[int]
    solver: Literal["euler"] = "euler"
    scales: list[tuple[float, float]] | None = Field(None, description="a step: of the state and of the velocity; none: 1 and 1")

    def scales_on(self, sigmas: Sequence[float]) -> list[tuple[float, float]] | None:
        """`scales` of the steps along `sigmas`, which are this sampler's grid or its end; None on another grid."""
        count = len(sigmas)
        return self.scales[1 - count :] if self.scales and count > 1 and list(sigmas) == self.sigmas[-count:] else None

    @property
    def num_steps(self) -> int:
        """Number of evaluations of the transformer per picture."""
        return len(self.sigmas) - 1

    @property
    def has_all_encoders(self) -> bool:
        """True unless restructuring has removed a text encoder without a successor."""
        return self.encoder in ("full", "compact")

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "tokens" in data:
            return data
        old = {key: value for key, value in data.items() if key.endswith("_tokens")}
        rest = {key: value for key, value in data.items() if key not in old}
        return rest | {"tokens": {key.removesuffix("_tokens"): value for key, value in old.items()}}

    @model_validator(mode="after")
    def _falls_to_zero(self) -> Self:
        pairs = zip(self.sigmas, self.sigmas[1:], strict=False)
        if self.sigmas[0] > 1 or self.sigmas[-1] != 0 or any(a <= b for a, b in pairs):
            raise ValueError("sigmas must fall strictly from at most 1 to exactly 0")
        if self.scales is not None and len(self.scales) != len(self.sigmas) - 1:
            raise ValueError(f"scales must have a pair for each of the {len(self.sigmas) - 1} steps, not {len(self.scales)}")
        return self


class Manifest(_Strict):
    """Everything that is recorded about one version. `family` and `world` are names that `families.get` and `worlds.get` know.

    A manifest without `family` was written by flashgen 0.1 or 0.2, which knew only "sd3".
    """

    schema_version: Literal[1] = 1
    kind: Kind
    family: str = Field("sd3", pattern=NAME_PATTERN)
    world: str | None = Field(None, pattern=NAME_PATTERN)
    stage: str = Field(min_length=1)
    version: str = Field(pattern=r"^v\d{4,}$")
    created: str
    flashgen_version: str
    recipe: dict[str, Any]
    seed: int
    parents: list[Parent]
    packages: dict[str, str]
    sampler: Sampler | None
    metrics: dict[str, Any]
    extra: dict[str, Any]
    files: list[File]
    digest: Sha256 = Field(default="0" * 64, validate_default=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        return self

    def sealed(self) -> Manifest:
        """Copy of the manifest with its content digest filled in."""
        return self.model_copy(update={"digest": content_digest(json.loads(self.model_dump_json()))})


def content_digest(manifest: Mapping[str, Any], is_old: bool = False) -> str:
    """sha256 over kind, family, world, sampler, `extra` and sorted files of a manifest as JSON data; `extra["key"]` is left out.

    The digest says what the artifact is, not when or from what it was made. It is computed from the data as written, so fields that later
    versions rename or add leave the digest of an old manifest valid. With `is_old` it is that of flashgen 0.1 to 0.3.0, which covers kind,
    sampler and files alone.
    """
    sampler = manifest["sampler"]
    if sampler is not None:
        sampler = {key: value for key, value in sampler.items() if value is not None}
    parts = [manifest["kind"], sampler, sorted([f["path"], f["size"], f["sha256"]] for f in manifest["files"])]
    if not is_old:
        extra = {key: value for key, value in manifest["extra"].items() if key != "key"}
        parts += [manifest.get("family"), manifest.get("world"), extra]
    return hash_json(parts)


def hash_json(value: Any) -> str:
    """sha256 (hex) of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(data: bytes, where: str) -> Manifest:
    """Check everything that the text alone can tell; raises ArtifactError."""
    mend = "take the artifact from its source again, or make it again with --force"
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON ({error}); {mend}") from error
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: schema_version is {found!r}, this flashgen reads {SCHEMA_VERSION}; install the flashgen that wrote it, or {mend}"
        )
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{where}: {'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}; {mend}") from error
    if manifest.digest not in (content_digest(raw), content_digest(raw, is_old=True)):
        raise ArtifactError(
            f"{where}: digest does not fit what it covers (kind, family, world, sampler, extra, files), so it was altered; {mend}"
        )
    return manifest
