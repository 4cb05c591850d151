"""Versions of a few bytes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashgen.artifact.draft import Draft, Origin, begin
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact


def origin(**changes: Any) -> Origin:
    """What a test's version is made of."""
    plain: dict[str, Any] = {"kind": "student", "stage": "distill", "family": "sd3", "world": None, "settings": {"steps": 4}, "seed": 0}
    return Origin(**(plain | {"parents": []} | changes))


def draft_of(out: Path, **changes: Any) -> Draft:
    """A version that is begun in `out`."""
    return begin(out, origin(**changes))


def publish(out: Path, text: str = "weights", sampler: Sampler | None = None, **changes: Any) -> Artifact:
    """A published version of two small files, which is no pipeline."""
    draft = draft_of(out, **changes)
    (draft.path / "vae").mkdir()
    (draft.path / "vae" / "w.safetensors").write_text(text)
    (draft.path / "model_index.json").write_text("{}")
    return draft.publish(sampler, metrics={"loss": 0.5})
