"""Writing pipelines into artifact drafts: changed components as fp16 safetensors, unchanged ones hard-linked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flashgen.artifact.store import Draft
from flashgen.models.specs import COMPONENTS
from flashgen.models.stream import header, weight_files, write


def save_pipeline(draft: Draft, pipe: StableDiffusion3Pipeline) -> None:
    """Every component, networks in fp16 (they are converted in place)."""
    pipe.to(torch.float16).save_pretrained(draft.path, safe_serialization=True)


def save_tensors(folder: Path, source: Path, value: Callable[[str], Tensor]) -> None:
    """A network with the config and the tensor names and shapes of that in `source`, in fp16, one tensor in memory at a time."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    kinds = {name: (torch.float16, tuple(e["shape"])) for path in weight_files(source) for name, e in header(path)[0].items()}
    write(folder / "diffusion_pytorch_model.safetensors", kinds, ((name, value(name).half()) for name in kinds))


def save_changed(
    draft: Draft, source: Path, changed: Mapping[str, nn.Module], dropped: Collection[str] = (), kept: Collection[str] = ()
) -> None:
    """The pipeline in `source` with some networks replaced, some components left out, and those `kept` that the draft has already."""
    index = json.loads((source / "model_index.json").read_text())
    for name in COMPONENTS:
        if name in dropped:
            index[name] = [None, None]
        elif name in changed:
            network: Any = changed[name]  # of diffusers or transformers, which both save themselves
            network.to(torch.float16).save_pretrained(draft.path / name, safe_serialization=True, max_shard_size="2GB")
        elif name not in kept and (source / name).is_dir():
            draft.link_tree(source / name, name)
    (draft.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
