"""An artifact of full size whose files have headers and no data: enough to plan, in a second and without disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flashgen.artifact.files import sha256
from flashgen.artifact.store import Artifact
from flashgen.models.stream import NAMES
from tests import runs


def sparse_teacher(out: Path, like: str = "sd35-medium") -> Artifact:
    """A teacher like `flashgen teacher random --like LIKE`, of no world, in sparse files; the digests of its weights are 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashgen.families.sd3.random_weights.save_file", _save_header)
        patch.setattr("flashgen.families.sd3.random_weights._weight", lambda network, name, meta, key: meta)
        patch.setattr("flashgen.families.sd3.random_weights.check_disk", lambda folder, needed: None)
        patch.setattr("flashgen.artifact.draft.digest", lambda file: "0" * 64 if file.suffix == ".safetensors" else sha256(file))
        return runs.random(like, out, world=None)


def _save_header(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
