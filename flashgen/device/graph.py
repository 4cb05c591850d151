"""The description of an exported artifact, by which its components draw: `Manifest.extra["graph"]`, format in `families.graphs`.

A description may come from a stranger: names, sizes and expressions are checked before anything is computed by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashgen import families
from flashgen.artifact.store import Artifact
from flashgen.errors import ArtifactError
from flashgen.pixels import Floats

MEND = "export the student again with: flashgen export"
MAX_DEPTH = 8  # of nested expressions
MAX_NUMBERS = 1 << 26  # in one transformer input per prompt, and in the latents of a picture

Folder = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,63}$")]  # of a component or tokenizer: stays inside the artifact
Name = Annotated[str, Field(min_length=1, max_length=256)]  # of a value, or of an input or output of an ONNX graph
Side = Annotated[int, Field(ge=1, le=1 << 16)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Encoder(_Strict):
    """One text encoder; `outputs` maps values, which expressions name, to outputs of its ONNX graph."""

    component: Folder
    tokenizer: Folder
    length: Side
    pad_id: int = Field(ge=0, lt=1 << 31)
    ids: Name
    mask: Name | None
    mask_value: Name | None
    outputs: dict[Name, Name] = Field(min_length=1, max_length=64)
    width: Side


class Transformer(_Strict):
    """Names of the transformer's inputs and output, and how they follow from latents, sigma and v."""

    latents: Name
    timestep: Name
    timestep_scale: float
    timestep_offset: float
    output: Name
    output_scale: float
    patch: int = Field(ge=0, le=64)
    tokens: int = Field(ge=1, le=1 << 22)
    width: Side


class Vae(_Strict):
    """Pixels per latent along a side (`factor`), the normalisation of latents, and sizes for memory estimates."""

    factor: int = Field(ge=1, le=256)
    scaling_factor: float = Field(gt=0)
    shift_factor: float
    channels: int = Field(ge=1, le=1 << 14)
    attention: bool


class Extent(NamedTuple):
    """Tokens and numbers per token of a value for one prompt; a mask has no axis of tokens (None).

    Outputs of an encoder count as a vector per token, which is too much for those that are one vector per prompt.
    """

    tokens: int | None
    width: int

    @property
    def numbers(self) -> int:
        """Numbers for one prompt."""
        return self.width if self.tokens is None else self.tokens * self.width


class Graph(_Strict):
    """A checked description. Latents are [B, C, h, w] outside of it, however the transformer packs them."""

    encoders: list[Encoder] = Field(min_length=1, max_length=8)
    conditioning: dict[Name, Any] = Field(min_length=1, max_length=16)
    transformer: Transformer
    vae: Vae
    latent_shape: list[Side] = Field(min_length=3, max_length=3)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        values = [value for encoder in self.encoders for value in (*encoder.outputs, encoder.mask_value) if value is not None]
        if len(set(values)) != len(values):
            raise ValueError("two encoder outputs have one name")
        if {self.transformer.latents, self.transformer.timestep} & set(self.conditioning):
            raise ValueError("conditioning names the transformer's latents or timestep")
        if prod(self.latent_shape) * self.vae.factor**2 > MAX_NUMBERS * 4:
            raise ValueError(f"latent_shape {self.latent_shape} is too large")
        patch = self.transformer.patch
        if patch and any(side % patch for side in self.latent_shape[1:]):
            raise ValueError(f"latents {self.latent_shape} cannot be cut into squares of {patch}")
        for name in self.conditioning:
            self.extent(name)
        return self

    # ---- conditioning

    def extent(self, name: str) -> Extent:
        """Size of the transformer input `name`. Raises ValueError for an expression that is malformed, too deep or too large."""
        values: dict[str, Extent] = {}
        for encoder in self.encoders:
            values |= dict.fromkeys(encoder.outputs, Extent(encoder.length, encoder.width))
            if encoder.mask_value is not None:
                values[encoder.mask_value] = Extent(None, encoder.length)
        return _extent(self.conditioning[name], values, 1)

    def condition(self, values: Mapping[str, Floats], rows: int) -> dict[str, Floats]:
        """The transformer's text inputs [rows, ...] by name, from the encoders' `values` [rows, ...]."""
        try:
            return {name: _evaluate(expression, values, rows) for name, expression in self.conditioning.items()}
        except ValueError as error:  # numpy's for shapes that do not fit
            raise ArtifactError(f"the outputs of the text encoders do not fit the description ({error}); {MEND}") from error

    def zero_feeds(self, inputs: Mapping[str, Sequence[int | None]]) -> dict[str, Floats]:
        """Zeros for one picture and the transformer's `inputs` {name: shape}; the description supplies sizes that are None."""
        feeds = self.feeds(np.zeros((1, *self.latent_shape), np.float32), 0.0, {})
        for name in self.conditioning:
            sizes = [size for size in self.extent(name) if size is not None]
            shape = [sizes[min(axis, len(sizes) - 1)] if size is None else size for axis, size in enumerate([*inputs.get(name, ())][1:])]
            feeds[name] = np.zeros([1, *shape], np.float32)
        return feeds

    # ---- transformer

    def feeds(self, x: Floats, sigma: float, conditioning: Mapping[str, Floats]) -> dict[str, Floats]:
        """All inputs of the transformer for latents `x` [B, C, h, w] at noise level `sigma`."""
        spec = self.transformer
        timestep = np.full(len(x), spec.timestep_scale * sigma + spec.timestep_offset, np.float32)
        return {spec.latents: pack(x, spec.patch) if spec.patch else x, **conditioning, spec.timestep: timestep}

    def velocity(self, output: Floats) -> Floats:
        """v [B, C, h, w] of the transformer's `output`."""
        spec = self.transformer
        v = unpack(output, spec.patch, self.latent_shape[1], self.latent_shape[2]) if spec.patch else output
        return v if spec.output_scale == 1 else np.float32(spec.output_scale) * v


def read_graph(artifact: Artifact) -> Graph:
    """The description of a device artifact; its family supplies those of flashgen 0.1 and 0.2.

    Raises ArtifactError for a description that is broken, or that does not fit the artifact's files and picture size.
    """
    manifest, path = artifact.manifest, artifact.path
    artifact.verify(".json")  # tokenizers, and the configs that describe old artifacts
    if manifest.sampler is None:
        raise ArtifactError(f"{path}: the manifest has no sampler; {MEND}")
    try:
        stored = "graph" in manifest.extra
        graph = Graph.model_validate(manifest.extra["graph"] if stored else families.get(manifest.family).describe_old(path, manifest))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("graph", *first["loc"])))
        raise ArtifactError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}; {MEND}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # of configs that an old artifact brings
        raise ArtifactError(f"{path}: the configs of its components are broken ({error!r}); {MEND}") from error
    height, width = (graph.vae.factor * side for side in graph.latent_shape[1:])
    if (height, width) != manifest.sampler.size_px:
        raise ArtifactError(f"{path}: latents give {width}x{height} px, the sampler {manifest.sampler.size_px}; {MEND}")
    files = {file.path for file in manifest.files}
    for encoder in graph.encoders:
        for name in (f"{encoder.component}/model.onnx", f"{encoder.tokenizer}/tokenizer.json"):
            if name not in files:
                raise ArtifactError(f"{path}: the manifest describes {name}, but does not list it; {MEND}")
    return graph


def pack(x: Floats, patch: int) -> Floats:
    """Tokens [B, (h/p)(w/p), C p p] of latents [B, C, h, w], row by row, channel-major within a token."""
    rows, channels, height, width = x.shape
    cut = x.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5)).reshape(rows, -1, channels * patch * patch)


def unpack(tokens: Floats, patch: int, height: int, width: int) -> Floats:
    """Latents [B, C, h, w] of tokens [B, (h/p)(w/p), C p p]."""
    cut = tokens.reshape(len(tokens), height // patch, width // patch, -1, patch, patch)
    return np.ascontiguousarray(cut.transpose(0, 3, 1, 4, 2, 5)).reshape(len(tokens), -1, height, width)


def _extent(expression: object, values: Mapping[str, Extent], depth: int) -> Extent:
    if depth > MAX_DEPTH:
        raise ValueError(f"an expression is nested more than {MAX_DEPTH} deep")
    match expression:
        case str():
            if expression not in values:
                raise ValueError(f"no encoder gives {expression[:64]!r}")
            extent = values[expression]
        case {"concat": [_, *_] as parts, "axis": axis, **rest} if not rest and _is_whole(axis) and axis in (-1, 1, 2, 3):
            extents = [_extent(part, values, depth + 1) for part in parts]
            tokens = [part.tokens for part in extents if part.tokens is not None]
            if len(tokens) < len(extents):
                extent = Extent(None, sum(part.width for part in extents))
            elif axis == 1:
                extent = Extent(sum(tokens), max(part.width for part in extents))
            else:
                extent = Extent(max(tokens), sum(part.width for part in extents))
        case {"pad": part, "to": size, **rest} if not rest and _is_whole(size) and size > 0:
            extent = Extent(_extent(part, values, depth + 1).tokens, size)
        case {"zeros": [length, width], **rest} if not rest and _is_whole(length, width) and length >= 0 and width > 0:
            extent = Extent(length, width)
        case _:
            raise ValueError(f"{str(expression)[:64]} is no expression")
    if extent.numbers > MAX_NUMBERS:
        raise ValueError(f"an expression gives {extent.numbers} numbers per prompt, the limit is {MAX_NUMBERS}")
    return extent


def _is_whole(*numbers: object) -> bool:
    return all(type(number) is int for number in numbers)  # true is an int, too


def _evaluate(expression: Any, values: Mapping[str, Floats], rows: int) -> Floats:
    if isinstance(expression, str):
        return values[expression]
    if "concat" in expression:
        return np.concatenate([_evaluate(part, values, rows) for part in expression["concat"]], expression["axis"])
    if "pad" in expression:
        part = _evaluate(expression["pad"], values, rows)
        return np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, expression["to"] - part.shape[-1])])
    return np.zeros((rows, *expression["zeros"]), np.float32)
