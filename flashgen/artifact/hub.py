"""Repositories of the Hugging Face Hub, which only names with the prefix `hf:` may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgen.errors import ArtifactError

HUB = "hf:"  # prefix of a hub id


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
