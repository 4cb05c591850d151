"""Loading the networks and tokenizers of a diffusers-layout artifact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from torch import nn

from flashgen.artifact.files import SOURCE, check_file, read_json
from flashgen.artifact.manifest import NAME
from flashgen.artifact.store import open_artifact
from flashgen.errors import ArtifactError, foreign
from flashgen.families.base import Family
from flashgen.models.networks import check_networks, has_nf4, is_large, on_disk, part_classes, with_nf4
from flashgen.runtime.accelerator import ALONE, BESIDE, free_bytes

SENTENCE = "a photo of a cat on a street at night"  # long enough for a regular expression that backtracks to fail on it
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("vocab.txt",))  # files that make a tokenizer
CPU = torch.device("cpu")


@dataclass
class Pipeline:
    """Networks and tokenizers of one diffusers-layout folder, by component; None for a component that the pipeline lacks.

    All networks compute on `device`.
    """

    family: Family
    folder: Path
    parts: dict[str, Any]
    device: torch.device = CPU

    def __getitem__(self, component: str) -> Any:
        return self.parts[component]

    @property
    def transformer(self) -> Any:
        """The transformer, a diffusers ModelMixin."""
        return self.parts["transformer"]

    @transformer.setter
    def transformer(self, network: nn.Module) -> None:
        self.parts["transformer"] = network

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.parts["vae"]

    def configs(self, component: str) -> Mapping[str, Any]:
        """Config of a network."""
        config = self.parts[component].config
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)  # transformers' and diffusers'

    def networks(self) -> Iterator[nn.Module]:
        """Every network that is there."""
        return (part for part in self.parts.values() if isinstance(part, nn.Module))

    def encodes_in_bf16(self) -> bool:
        """Return True if any text encoder computes in bf16, as large ones do."""
        networks = [self.parts[name] for name in self.family.text_encoders]
        return any(next(network.parameters()).dtype == torch.bfloat16 for network in networks if network is not None)


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    weights: Literal["all", "training", "text", "transformer", "vae", "disk", "none"] = "all",
    device: torch.device = CPU,
) -> Pipeline:
    """A pipeline on `device` in eval mode without gradient, the transformer in `dtype` and the rest in fp32.

    Large text encoders compute in bf16, the type that T5-XXL was trained in; they stay on disk (`models.networks.on_disk`) unless they fit
    into the free memory of an accelerator; with weights "training", which leaves this memory to a training, they stay there in any case.
    With "text", "transformer" or "vae" all other networks are shapes without weights, with "none" all are; with "disk" every network
    stays on disk, in fp32. Safetensors only; nothing is fetched and no code of the artifact runs. A published version is verified first
    (`Artifact.verify`). Raises ArtifactError before a network is loaded.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one bar per component, gone at once
    path = Path(path)
    if (path / NAME).exists():
        open_artifact(path).verify()
    family, networks = check_networks(path)
    parts: dict[str, Any] = dict.fromkeys(family.components)
    classes = part_classes(path, family)
    for name, encoder in family.text_encoders.items():  # first: they are quick to be refused
        if name in networks:
            embeddings: Any = networks[name].get_input_embeddings()  # type: ignore[operator]  # transformers' networks have it
            parts[encoder.tokenizer] = _tokenizer(path / encoder.tokenizer, classes[encoder.tokenizer], embeddings.num_embeddings)
    for name, empty in networks.items():
        parts[name] = _network(path / name, name, empty, family, dtype, weights, device)
    pipe = Pipeline(family, path, parts, device)
    for network in pipe.networks():
        network.eval().requires_grad_(False)
    return pipe


def _network(
    folder: Path, name: str, empty: nn.Module, family: Family, dtype: torch.dtype, weights: str, device: torch.device
) -> nn.Module:
    if weights == "disk":
        return on_disk(folder, empty, torch.float32, device)
    kind = "transformer" if name == "transformer" else "text" if name in family.text_encoders else "vae"
    if weights not in ("all", "training", kind):
        return empty
    large = kind == "text" and is_large(folder)
    if large and (weights == "training" or not _fits(empty, device, BESIDE if weights == "all" else ALONE)):
        return on_disk(folder, empty, torch.bfloat16, device)
    wanted = torch.bfloat16 if large else dtype if name == "transformer" else torch.float32
    if name == "transformer" and has_nf4(folder):  # diffusers would need bitsandbytes and a GPU
        return with_nf4(folder, empty, wanted).to(device)
    with foreign(lambda why: ArtifactError(f"{folder} does not load ({why}); {SOURCE}")), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries rename torch_dtype to dtype; older ones know the old name only
        network_class = family.network_classes()[name]
        network: nn.Module = network_class.from_pretrained(str(folder), torch_dtype=wanted, local_files_only=True, use_safetensors=True)
    return network.to(device)


def _fits(encoder: nn.Module, device: torch.device, share: float) -> bool:
    """Return True if an accelerator holds a text encoder in bf16 in `share` of what is free."""
    free = free_bytes(device)
    return free is not None and 2 * sum(p.numel() for p in encoder.parameters()) < free * share


def _tokenizer(folder: Path, class_name: str, vocabulary: int) -> Any:
    """The tokenizer of the class that model_index.json names, which must be one of transformers'.

    Raises ArtifactError for one that does not encode a sentence, or that gives ids which its text encoder, with embeddings of
    `vocabulary` tokens, does not have.
    """
    for name in next((names for names in VOCABULARIES if (folder / names[0]).is_file()), VOCABULARIES[0]):
        check_file(folder / name)
    for file in folder.glob("*.json"):
        read_json(file)
    with foreign(lambda why: ArtifactError(f"{folder} is no tokenizer ({why}); {SOURCE}")):
        kind = getattr(transformers, class_name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            raise ValueError(f"model_index.json names {class_name!r}, which is no tokenizer of transformers")
        any_kind: Any = kind
        tokenizer = any_kind.from_pretrained(str(folder), local_files_only=True)
        if not set(tokenizer(SENTENCE).input_ids) - set(tokenizer.all_special_ids):
            raise ValueError("its vocabulary has no words")
        if (largest := max(tokenizer.get_vocab().values())) >= vocabulary:
            raise ValueError(f"it gives ids up to {largest}, its text encoder has {vocabulary} embeddings")
    return tokenizer
