"""The networks of a pipeline as shapes without weights, and the check that a folder's files fit them. Only headers are read."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from diffusers import ModelMixin
from torch import nn

from flashgen import families
from flashgen.artifact.files import SOURCE, read_json
from flashgen.errors import ArtifactError, foreign
from flashgen.families.base import Family
from flashgen.families.configs import read_config
from flashgen.models.nf4 import STATE, unpack
from flashgen.models.stream import header, read, tensor, tensor_files, weight_files

LARGE_BYTES = 1 << 30  # weights above which a text encoder stays on disk
INDEX = "model_index.json"
MEND = "take it from its source again, or save it from diffusers in fp16, bf16 or fp32"


def empty_network(folder: Path, name: str, family: Family) -> nn.Module:
    """Component `name` of the pipeline in `folder` from its config; weights on `meta`. Raises ArtifactError for a broken config.

    The class is the family's; nothing in the config chooses code, and nothing is fetched.
    """
    kind, config = family.network_classes()[name], read_config(folder, name, family.schemas.get(name))
    with foreign(lambda why: ArtifactError(f"{folder / name}/config.json makes no {kind.__name__} ({why}); {SOURCE}")):
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise ValueError(f"it is of {config['_class_name']!r}")
        if issubclass(kind, ModelMixin):
            with torch.device("meta"):  # its position table too, 900 MB of SD3.5-Medium
                network: Any = kind.from_config(config)
        else:
            with init_empty_weights():  # buffers are there: no file has them
                network = kind(kind.config_class.from_dict(config))
                network.set_input_embeddings(network.get_input_embeddings())  # T5 has two names for them
    made: nn.Module = network.eval()
    return made


def is_large(folder: Path) -> bool:
    """Return True if the weights of a network are more than `LARGE_BYTES`."""
    return sum(path.stat().st_size for path in weight_files(folder)) > LARGE_BYTES


def parameter_names(network: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Each parameter and all its names; files keep a tied parameter under one of its names."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(names.values())


def linears_of(network: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers of a network by name, in order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def on_disk(folder: Path, network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`network`, made without weights: each layer reads its weights from `folder` to `device` when it runs, and drops them afterwards."""
    files = tensor_files(folder)
    index: dict[str, dict[str, str]] = {}
    for _, names in parameter_names(network):
        stored = next(name for name in names if name in files)
        entry = {"safetensors_file": str(files[stored]), "weight_name": stored, "dtype": str(dtype).removeprefix("torch.")}
        index |= dict.fromkeys(names, entry)
    nn.Module.to(network, dtype)  # diffusers' own warns of modules that it does not have
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # the transformer's position table
            module, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(module), attribute, tensor(files[name], name).to(device, dtype))
        else:
            buffer.data = buffer.data.to(device)
    attach_align_device_hook(network, execution_device=device, offload=True, weights_map=OffloadedWeightsLoader(index=index))
    return network


def with_nf4(folder: Path, network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`network`, made without weights, filled from `folder`, where Linear layers are stored as NF4 codes."""
    tensors = {name: value for path in weight_files(folder) for name, value in read(path)}
    coded = [name.removesuffix(f".weight.{STATE}") for name in tensors if name.endswith(STATE)]
    for layer in coded:
        parts = {name.removeprefix(f"{layer}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{layer}.weight")}
        tensors[f"{layer}.weight"] = unpack(parts)
    try:
        network.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: its NF4 codes do not fit its config ({error}); {MEND}") from error
    return network


def has_nf4(folder: Path) -> bool:
    """Return True if a network is stored as NF4 codes."""
    return any(name.endswith(STATE) for path in weight_files(folder) for name in header(path)[0])


def check_networks(folder: Path) -> tuple[Family, dict[str, nn.Module]]:
    """The model family of the pipeline in `folder`, and its networks without weights.

    Raises ArtifactError, with one clear sentence, when no family loads such a pipeline, or when files are missing, of a foreign type,
    or hold other tensors than the configs ask for.
    """
    if not (folder / INDEX).is_file():
        raise ArtifactError(f"{folder} has no {INDEX}; give a diffusers pipeline folder")
    name = read_json(folder / INDEX).get("_class_name")
    family = families.of_pipeline(str(name))
    if family is None:
        known = "; ".join(f"{other.pipeline_class} ({other.models})" for other in map(families.get, families.names()))
        raise ArtifactError(f"{folder} is a {name}; flashgen takes {known}")
    classes = part_classes(folder, family)
    for part, kind in family.network_classes().items():
        if classes.get(part, kind.__name__) != kind.__name__:
            raise ArtifactError(f"{folder}/{INDEX}: {part} is a {classes[part]}, flashgen takes a {kind.__name__}")
    networks = {part: empty_network(folder, part, family) for part in family.networks if part in classes}
    for part, network in networks.items():
        _check(folder / part, network)
    return family, networks


def part_classes(folder: Path, family: Family) -> dict[str, str]:
    """Class names of the components that model_index.json gives to the pipeline in `folder`.

    Raises ArtifactError for one that is missing and that the family needs: a network, or a present text encoder's tokenizer.
    """
    file = folder / INDEX
    index, classes = read_json(file), dict[str, str]()
    for part in family.components:
        match index.get(part, [None, None]):
            case [None, _]:
                continue
            case [str(), str() as name]:
                classes[part] = name
            case other:
                raise ArtifactError(f"{file}: {part} is {other!r}, not the library and class of a component; {SOURCE}")
    tokenizers = {encoder.tokenizer for name, encoder in family.text_encoders.items() if name in classes}
    if missing := ({*family.networks} - family.optional | tokenizers) - classes.keys():
        raise ArtifactError(f"{file} names no {min(missing)}; {SOURCE}")
    return classes


def _check(folder: Path, network: nn.Module) -> None:
    found = {name: entry for path in weight_files(folder) for name, entry in header(path)[0].items()}
    stem = "diffusion_pytorch_model" if isinstance(network, ModelMixin) else "model"
    for path in weight_files(folder):
        if re.split(r"[-.]", path.name)[0] != stem:
            raise ArtifactError(f"{path} is not called {stem}.safetensors, as diffusers names weights; {MEND}")
    for parameter, names in parameter_names(network):
        name = next((name for name in names if name in found), None)
        if name is None:
            raise ArtifactError(f"{folder} has no tensor {names[0]}, which its config asks for; {MEND}")
        if f"{name}.{STATE}" in found and 2 * prod(found[name]["shape"]) == parameter.numel():
            continue
        if list(found[name]["shape"]) != list(parameter.shape):
            shapes = f"{found[name]['shape']}, its config asks for {list(parameter.shape)}"
            raise ArtifactError(f"{folder}: {name} is {shapes}; config and weights belong to different models")
        if not found[name]["dtype"].startswith(("F", "BF")):
            raise ArtifactError(f"{folder}: {name} is of type {found[name]['dtype']}, which holds no weights; {MEND}")
