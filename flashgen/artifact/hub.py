"""Repositories of the Hugging Face Hub, which only names with the prefix `hf:` may ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgen.errors import ArtifactError, UsageError

HUB = "hf:"  # prefix of a hub id
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


def check_origin(origin: str, setting: str = "") -> None:
    """Raises ArtifactError if `origin` is no folder, and UsageError if it is hf: without OWNER/NAME; `setting` begins the message."""
    name = origin.removeprefix(HUB)
    if name != origin and not HUB_ID.fullmatch(name):
        raise UsageError(f"{setting}{origin} is no hub id; write {HUB}OWNER/NAME")
    if name == origin and not Path(origin).is_dir():
        hub = f"; for a repository on the hub write {HUB}{origin}" if HUB_ID.fullmatch(origin) else ""
        raise ArtifactError(f"{setting}there is no folder {origin}{hub}")


def fetch(name: str, patterns: Sequence[str], **options: Any) -> Path:
    """Folder in the hub's cache with the files of repository `name` that match `patterns`; `options` are snapshot_download's.

    Raises ArtifactError for a repository that is gated or cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:
        kind = type(error).__name__
        if kind == "GatedRepoError":
            raise ArtifactError(
                f"{name} is gated: accept its licence on https://huggingface.co/{name}, then log in with: hf auth login"
            ) from error
        raise ArtifactError(f"{name} could not be fetched from the hub ({kind}); give a local folder") from error
