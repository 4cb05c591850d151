"""Writing networks into artifact drafts: changed components as fp16 safetensors, unchanged ones hard-linked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.artifact.draft import Draft
from flashgen.artifact.files import read_json
from flashgen.errors import NumericsError
from flashgen.families.base import Family
from flashgen.families.tiny_decoder import TINY_DECODER
from flashgen.models.pipeline import Pipeline
from flashgen.models.stream import header, weight_files, write

CONFIG = "config.json"


def to_half(tensor: Tensor, name: str) -> Tensor:
    """`tensor` in fp16. Raises NumericsError for values that are not finite or that fp16 cannot hold."""
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        worst = float(tensor.detach().float().abs().nan_to_num(nan=torch.inf).max())
        raise NumericsError(
            f"{name} holds {worst:.4g}, and fp16 ends at 65504; nothing was written. Scale it, or train again with a lower learning rate"
        )
    return half


def save_network(network: Any, folder: Path) -> None:
    """A diffusers or transformers network in fp16 (converted in place, and moved to the CPU).

    Raises NumericsError for weights that fp16 cannot hold.
    """
    for name, parameter in network.named_parameters():
        to_half(parameter.data, f"{folder.name}: {name}")
    network.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True, max_shard_size="2GB")
    (folder / CONFIG).write_text(json.dumps(without_origin(read_json(folder / CONFIG)), indent=2, sort_keys=True) + "\n")


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the folder of this machine that diffusers read the network from: the same training gives the same bytes anywhere."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def save_pipeline(folder: Path, pipe: Pipeline) -> None:
    """Every component of a pipeline built in memory, and model_index.json."""
    for name, part in pipe.parts.items():
        if isinstance(part, nn.Module):
            save_network(part, folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)
    write_index(folder, pipe.family.pipeline_class, pipe.parts)


def write_index(folder: Path, pipeline_class: str, parts: Mapping[str, Any]) -> None:
    """model_index.json: the library and class of each component, as diffusers writes it."""
    classes = {name: [None, None] if part is None else [_library(part), type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class, **classes}, indent=2) + "\n")


def _library(part: object) -> str:
    module = type(part).__module__
    library = module.partition(".")[0]
    return library if library in ("diffusers", "transformers") else module


def save_tensors(folder: Path, source: Path, value: Callable[[str], Tensor]) -> None:
    """A network with the config and the tensor names and shapes of that in `source`, in fp16, one tensor in memory at a time."""
    folder.mkdir()
    shutil.copyfile(source / CONFIG, folder / CONFIG)
    kinds = {name: (torch.float16, tuple(e["shape"])) for path in weight_files(source) for name, e in header(path)[0].items()}
    write(folder / "diffusion_pytorch_model.safetensors", kinds, ((name, to_half(value(name), name)) for name in kinds))


def save_changed(
    draft: Draft,
    source: Path,
    family: Family,
    changed: Mapping[str, nn.Module],
    dropped: Collection[str] = (),
    kept: Collection[str] = (),
) -> None:
    """The pipeline in `source` with the networks `changed` replaced and the components `dropped` left out.

    Components `kept` are in the draft already; all others are linked, and so is a tiny decoder beside the pipeline.
    """
    index = read_json(source / "model_index.json")
    for name in (*family.components, TINY_DECODER):
        if name in dropped:
            index[name] = [None, None]
        elif name in changed:
            save_network(changed[name], draft.path / name)
        elif name not in kept and (source / name).is_dir():
            draft.link_tree(source / name, name)
    (draft.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
