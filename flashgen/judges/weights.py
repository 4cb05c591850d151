"""Weights of judges: a local folder or a repository of the Hugging Face Hub, the files that are read and their digest."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flashgen.artifact.files import sha256
from flashgen.artifact.hub import HUB, fetch
from flashgen.artifact.manifest import hash_json
from flashgen.errors import ArtifactError, UsageError
from flashgen.progress import say

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")  # owner/name, perhaps a revision
SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", *TOKENIZER)
NETWORK = ("config.json", "model.safetensors.index.json")
LONE = (".safetensors", ".pth")  # a file without config.json: the Inception of FID


@dataclass(frozen=True)
class Weights:
    """Files of one network in `folder`; `origin` is what the user wrote, `config` the contents of config.json ({} without one)."""

    origin: str
    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """sha256 over the sha256s of the files; their names and the folder's do not count."""
        return hash_json(sorted(sha256(path) for path in self.files))

    @property
    def model_type(self) -> str:
        """Name of the architecture in transformers: clip, dinov2, ...; "" without config.json."""
        return str(self.config.get("model_type", ""))

    def describe(self) -> str:
        """Class of the weights for messages: `Dinov2Model (dinov2)`."""
        classes = self.config.get("architectures") or ["weights"]
        return f"{classes[0]} ({self.model_type})" if self.config else "weights without config.json"

    def load(self, network: str, device: str) -> Any:
        """Build the class of transformers that is named `network` with these weights, fp32, in eval mode.

        Raises ArtifactError when tensors are missing or of another shape.
        """
        import torch
        import transformers
        from safetensors import SafetensorError

        transformers.utils.logging.disable_progress_bar()

        try:
            options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            model, info = getattr(transformers, network).from_pretrained(self.folder, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{self.origin} cannot be read as a {network} ({reason}); take the weights again") from error
        if missing := sorted(info["missing_keys"]):
            raise ArtifactError(
                f"{self.origin} lacks {len(missing)} tensors of a {network}, {missing[0]} among them; "
                "take the weights again, or correct config.json"
            )
        return model.eval().requires_grad_(False).to(device)


def find_weights(origin: str, more: tuple[str, ...] = ()) -> Weights:
    """Weights of `FOLDER`, a lone file of FID's Inception, or `hf:OWNER/NAME[@REVISION]`, which is downloaded into the hub's cache.

    `more`: names of files that are used beside the network's, where they exist. Only `hf:` asks the hub. Raises UsageError for what is no
    hub id, ArtifactError for what is missing, pickled or cannot be read.
    """
    path = _download(origin, more) if origin.startswith(HUB) else Path(origin).expanduser()
    if path.is_file() and path.suffix in LONE:
        return Weights(origin, path.parent, (path,), {})
    if not path.is_dir():
        hub = f"; for a repository on the hub write {HUB}{origin}" if HUB_ID.fullmatch(origin) else ""
        raise ArtifactError(f"there is no folder of weights {origin}{hub}")
    if not (path / "config.json").is_file():
        lone = [file for file in sorted(path.iterdir()) if file.suffix in LONE]
        if len(lone) != 1:
            raise ArtifactError(f"{origin} has no config.json; give a folder as transformers' save_pretrained writes")
        return Weights(origin, path, (lone[0],), {})
    config = _read_config(path / "config.json", origin)
    files = sorted(file for file in path.iterdir() if file.name in (*NETWORK, *more) or SHARD.fullmatch(file.name))
    if not any(SHARD.fullmatch(file.name) for file in files):
        source = origin.removeprefix(HUB)
        raise ArtifactError(
            f"{origin} has no model.safetensors, and pickled weights, which can run code, are not read; where you trust them: "
            f"python -c \"import transformers as t; t.AutoModel.from_pretrained('{source}').save_pretrained('FOLDER')\""
        )
    return Weights(origin, path, tuple(files), config)


def image_processor() -> Any:
    """transformers' image processor of CLIP that computes with Pillow, so that torchvision's presence changes no number."""
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as Processor
    return Processor


def _read_config(path: Path, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin}: config.json cannot be read ({error}); take the weights again") from error
    if not config or not isinstance(config, dict) or not isinstance(config.get("architectures") or [""], list):
        raise ArtifactError(f"{origin}: config.json is no configuration of transformers; take the weights again")
    return config


def _download(origin: str, more: tuple[str, ...]) -> Path:
    match = HUB_ID.fullmatch(origin.removeprefix(HUB))
    if match is None:
        raise UsageError(f"{origin} is no hub id; write {HUB}OWNER/NAME")
    name, revision = match.groups()
    say(f"judge: fetching the weights of {name} from the hub, unless its cache has them")
    return fetch(name, [*NETWORK, *more, "model.safetensors", "model-*-of-*.safetensors"], revision=revision)
