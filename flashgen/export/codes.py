"""The folder quantized/ of an artifact: codes of its layers as `quantize` writes them and `export` reads them.

quantized/PART.safetensors     LAYER.codes, LAYER.scales, LAYER.zeros; `basis` [r, K] where adaLN layers share one
quantized/layers.json          {LAYER: {bits, group, symmetric}} of the transformer; of a text encoder: PART.json. A layer with static
                               activations also has `inputs`: [scale, zero point]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgen.artifact.files import read_json
from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError
from flashgen.models.factored import factor
from flashgen.models.networks import linears_of
from flashgen.models.stream import stored, tensor, tensor_files, write
from flashgen.quant.layer import stored_tensors
from flashgen.quant.pack import InputScale, QuantizedLinear, dequantize

FOLDER = "quantized"
BASIS = "basis"


def specs_file(part: str) -> str:
    """Name of the file with the bits and groups of a component's layers."""
    return "layers.json" if part == "transformer" else f"{part}.json"


def write_codes(version: Path, part: str, codes: Mapping[str, QuantizedLinear], basis: Tensor | None = None) -> int:
    """Write the codes of component `part`, and the `basis` [K, r] of factored layers, into `version`; returns the bytes of all tensors."""
    tensors = {f"{name}.{key}": value for name, q in codes.items() for key, value in stored_tensors(q).items()}
    if basis is not None:
        tensors[BASIS] = basis.T.half().contiguous()
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    write(version / FOLDER / f"{part}.safetensors", shapes, tensors.items())
    specs = {
        name: {"bits": q.bits, "group": "channel" if q.channel else q.group, "symmetric": q.zeros is None}
        | ({"inputs": list(q.inputs)} if q.inputs else {})
        for name, q in codes.items()
    }
    (version / FOLDER / specs_file(part)).write_text(json.dumps(specs, indent=1) + "\n")
    return sum(value.nbytes for value in tensors.values())


def read_codes(source: Artifact, part: str = "transformer") -> dict[str, QuantizedLinear]:
    """Codes of every layer of a component, in the order of their file; none for a text encoder that is not quantized.

    Artifacts of flashgen 0.1 and 0.2 keep a number as the group of layers with one scale per output; there the recipe in the manifest says
    that the transformer has these. Raises ArtifactError for files that do not fit each other or the network.
    """
    folder = source.path / FOLDER
    if part != "transformer" and not (folder / specs_file(part)).exists():
        return {}
    with one_sentence(source.path):
        specs = read_json(folder / specs_file(part))
        tensors = load_file(folder / f"{part}.safetensors")
        shapes = {name.removesuffix(".weight"): weight.shape for name, weight in stored(source.path / part).items()}
        channel = part == "transformer" and source.manifest.recipe.get("group") == "channel"
        codes = {}
        for name, spec in specs.items():
            k = len(tensors[BASIS]) if name not in shapes else shapes[name][1]  # the `up` of a factored layer reads the basis
            codes[name] = _layer(tensors, name, spec, k, channel or spec["group"] == "channel")
        return codes


def _layer(tensors: Mapping[str, Tensor], name: str, spec: Mapping[str, Any], k: int, channel: bool) -> QuantizedLinear:
    """Codes of one layer with `k` inputs. Raises ValueError or KeyError for tensors that do not fit `spec`."""
    codes, scales, bits = tensors[f"{name}.codes"], tensors[f"{name}.scales"].float(), int(spec["bits"])
    group = k if channel else int(spec["group"])
    zeros = None if spec["symmetric"] else tensors[f"{name}.zeros"]
    if zeros is not None and zeros.is_floating_point():
        zeros = zeros.float()
    if bits not in (2, 3, 4, 8) or group < 16 or scales.ndim != 2 or (channel and (bits != 8 or zeros is not None)):
        raise ValueError(f"{name} has {bits} bits in groups of {spec['group']}")
    rows, groups = len(scales), -(-k // group)
    wanted, there = [[rows, groups], [rows, groups, group * bits // 8]], [list(scales.shape), list(codes.shape)]
    if zeros is not None:
        wanted.append([rows, groups if zeros.is_floating_point() else -(-groups * bits // 8)])
        there.append(list(zeros.shape))
    if there != wanted or codes.dtype != torch.uint8:
        raise ValueError(f"codes, scales and zeros of {name} do not fit its {k} inputs")
    return QuantizedLinear(
        codes, scales, zeros, bits, group, k, channel, _inputs(name, spec["inputs"], channel) if "inputs" in spec else None
    )


def _inputs(name: str, pair: Sequence[Any], channel: bool) -> InputScale:
    """Scale and zero point of a layer's inputs. Raises ValueError for numbers that no product of integers takes."""
    scale, zero = pair
    if not channel or type(scale) is not float or not 0 < scale < inf or type(zero) is not int or not 0 <= zero <= 255:
        raise ValueError(f"the inputs of {name} have scale {scale} and zero point {zero}")
    return InputScale(scale, zero)


def put_factors(transformer: nn.Module, codes: Mapping[str, QuantizedLinear], source: Path) -> None:
    """Replace adaLN layers that the artifact keeps on a shared basis by their factors with dequantized weights, in place.

    Codes of such a layer are those of LAYER.up, which the network does not have (a family may have other layers of that name).
    """
    linears = linears_of(transformer)
    ups = {name.removesuffix(".up"): dequantize(q) for name, q in codes.items() if name not in linears}
    if not ups:
        return
    with one_sentence(source):
        basis = tensor(source / FOLDER / "transformer.safetensors", BASIS).float().T.contiguous()
        for name, up in ups.items():
            if (*up.shape, len(basis)) != (linears[name].out_features, basis.shape[1], linears[name].in_features):
                raise ValueError(f"the factors of {name} do not fit it")
        files = tensor_files(source / "transformer")  # the network's own biases may be on disk
        biases = {name: tensor(files[f"{name}.bias"], f"{name}.bias").float() for name in ups}
        factor(transformer, basis, ups, biases)


@contextmanager
def one_sentence(version: Path) -> Iterator[None]:
    """Raise any error from reading quantized/ as an ArtifactError with one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        mend = "make it again with: flashgen quantize STUDENT --out DIR"
        raise ArtifactError(f"{version}/{FOLDER} is broken ({error!r}); {mend}") from error
