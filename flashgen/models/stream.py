"""Safetensors one tensor at a time, by plain reads and writes: a memory map would count every touched page as resident memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flashgen.artifact.files import SOURCE, check_file, read_json
from flashgen.errors import ArtifactError, foreign

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
NUMBER = re.compile(r"-\d{5}-of-\d{5}")  # of a shard
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """({name: {dtype, shape, data_offsets}} in the order of the data, offset of the data). Raises ArtifactError for a broken file."""
    check_file(path)
    with foreign(lambda why: ArtifactError(f"{path} is not a whole safetensors file ({why}); {SOURCE}")):
        with safe_open(path, "pt"):  # checks the header: bounds, overlaps, types
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    unknown = sorted({e["dtype"] for e in entries.values()} - DTYPES.keys())
    if unknown:
        raise ArtifactError(f"{path} holds tensors of type {', '.join(unknown)}, flashgen reads {', '.join(DTYPES)}; give plain weights")
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])), 8 + size


def tensor(path: Path, name: str) -> Tensor:
    """Tensor `name` of a file."""
    with safe_open(path, "pt") as file:
        value: Tensor = file.get_tensor(name)
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network, sorted: the files that its index names, or all.

    Variants beside plain weights, as model.fp16.safetensors beside model.safetensors, are second copies and are left out. Raises
    ArtifactError for files that are missing, for an index that names files elsewhere, and for several variants without plain weights.
    """
    index, files = weight_layout(folder)
    if index is not None:
        shards = read_json(index).get("weight_map")
        if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
            raise ArtifactError(f"{index} is no index of shards (it has no weight_map); {SOURCE}")
        names = sorted(set(shards.values()))
        for name in names:
            if not SHARD.fullmatch(name):
                raise ArtifactError(f"{index} names {name!r}, which is no safetensors file beside it; {SOURCE}")
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder} lacks {name}, one of the {len(names)} shards that its index names; {SOURCE}")
        files = [folder / name for name in names]
    if not files:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".gguf", ".bin", ".pt", ".ckpt", ".onnx"))
        what = f"holds {others[0]}, which flashgen does not read" if others else "has no safetensors weights"
        raise ArtifactError(f"{folder} {what}; save the pipeline from diffusers with safe_serialization=True")
    return files


def weight_layout(folder: Path) -> tuple[Path | None, list[Path]]:
    """(index of shards or None, weight files) of the plain weights in `folder`, or of the one variant that it has instead."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors*")):
        variants.setdefault(variant(path.name), []).append(path)
    if len(variants) > 1 and "" not in variants:
        raise ArtifactError(f"{folder} has its weights as {' and as '.join(variants)} and none without; remove all but one")
    paths = variants.get("") or next(iter(variants.values()), [])
    index = next((path for path in paths if path.suffix == ".json"), None)
    return index, [path for path in paths if path.suffix == ".safetensors"]


def variant(name: str) -> str:
    """Variant in the name of a weight file or an index, as fp16 in model.fp16.safetensors; "" in a plain name."""
    return ".".join(part for part in NUMBER.sub("", name).split(".")[1:] if part not in ("safetensors", "index", "json"))


def plain_name(name: str) -> str:
    """The name of a weight file or an index without its variant."""
    kind = variant(name)
    return name.replace(f".{kind}", "", 1) if kind else name


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor of a network, by name."""
    return {name: path for path in weight_files(folder) for name in header(path)[0]}


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the file."""
    entries, start = header(path)
    with path.open("rb") as file:
        for name, entry in entries.items():
            yield name, _tensor(file, start, entry)


@dataclass(frozen=True)
class Stored:
    """Handle of a tensor in a file; calling it reads the tensor."""

    path: Path
    start: int
    entry: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.entry["shape"])

    def __call__(self) -> Tensor:
        """The tensor, read from its file."""
        with self.path.open("rb") as file:
            return _tensor(file, self.start, self.entry)


def stored(folder: Path) -> dict[str, Stored]:
    """Handles of all tensors of a network, by name."""
    handles: dict[str, Stored] = {}
    for path in weight_files(folder):
        entries, start = header(path)
        handles |= {name: Stored(path, start, entry) for name, entry in entries.items()}
    return handles


def _tensor(file: BufferedReader, start: int, entry: dict[str, Any]) -> Tensor:
    low, high = entry["data_offsets"]
    file.seek(start + low)
    data = bytearray(high - low)
    file.readinto(data)
    dtype = DTYPES[entry["dtype"]]
    return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"]) if data else torch.empty(entry["shape"], dtype=dtype)


def write(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors` in the order of `shapes`, from which the header in front of them is made."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, tensor), (expected, (dtype, shape)) in zip(tensors, shapes.items(), strict=True):
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, tuple(shape)), name
            file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
