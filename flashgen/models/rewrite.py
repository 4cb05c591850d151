"""Rewriting the weights of a network from file to file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flashgen.artifact.files import link
from flashgen.families.base import Family
from flashgen.models.networks import empty_network, linears_of
from flashgen.models.save import to_half
from flashgen.models.stream import DTYPES, header, read, weight_files, write
from flashgen.progress import Progress


def linear_shapes(folder: Path, component: str, family: Family) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every Linear of a component of the pipeline in `folder`, in the order of the network; from its config alone."""
    linears = linears_of(empty_network(folder, component, family))
    return {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}


def rewrite_network(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], label: str) -> None:
    """Write the network in `source` to `target` in the same shards, floating-point tensors as `change(name, tensor)` in fp16.

    Other files are linked. Raises NumericsError for a tensor that fp16 cannot hold.
    """
    files = weight_files(source)
    entries = {path: header(path)[0] for path in files}
    target.mkdir()
    with Progress(label, sum(map(len, entries.values()))) as progress:

        def changed(path: Path) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in read(path):
                yield name, to_half(change(name, tensor), f"{source.name}: {name}") if tensor.is_floating_point() else tensor
                progress.advance()

        for path in files:
            kinds = {name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries[path].items()}
            halved = {name: (torch.float16 if dtype.is_floating_point else dtype, shape) for name, (dtype, shape) in kinds.items()}
            write(target / path.name, halved, changed(path))
    for path in source.iterdir():
        if path not in files and path.is_file():
            link(path, target / path.name)
