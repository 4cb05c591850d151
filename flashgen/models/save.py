"""Writing pipelines into artifact drafts: changed components as fp16 safetensors, unchanged ones hard-linked."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from flashgen.artifact.store import Draft

COMPONENTS = (
    "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler",
)  # fmt: skip


def save_pipeline(draft: Draft, pipe: StableDiffusion3Pipeline) -> None:
    """Every component, networks in fp16 (they are converted in place)."""
    pipe.to(torch.float16).save_pretrained(draft.path, safe_serialization=True)


def save_changed(
    draft: Draft, source: Path, changed: Mapping[str, nn.Module], dropped: Collection[str] = (), kept: Collection[str] = ()
) -> None:
    """The pipeline in `source` with some networks replaced, some components left out, and those `kept` that the draft has already."""
    index = json.loads((source / "model_index.json").read_text())
    for name in COMPONENTS:
        if name in dropped:
            index[name] = [None, None]
        elif name in changed:
            changed[name].to(torch.float16).save_pretrained(draft.path / name, safe_serialization=True)  # type: ignore[operator]
        elif name not in kept and (source / name).is_dir():
            draft.link_tree(source / name, name)
    (draft.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
