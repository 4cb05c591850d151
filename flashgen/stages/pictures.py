"""Real pictures for the adversarial term: decoded, resized and encoded once by the VAE, kept as latents in the cache that runs share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.artifact.files import sha256
from flashgen.artifact.manifest import Sampler, hash_json
from flashgen.errors import UsageError
from flashgen.families.configs import configs_in
from flashgen.models.footprint import Footprint
from flashgen.pixels import Size, from_uint8
from flashgen.progress import warn
from flashgen.recipe.distillation import AdversarialTraining, MatchingTraining
from flashgen.runtime.processes import from_first
from flashgen.stages.base import Stage
from flashgen.stages.picture_files import FORMATS, Listing, Picture, decode, proportions
from flashgen.stages.planning import Plan
from flashgen.stages.trajectories import DROP_STREAM, cache_name, text_pool

if TYPE_CHECKING:
    import mmap

    from torch import Tensor

    from flashgen.models.pipeline import Pipeline
    from flashgen.training.pictures import RealPictures

NAMED = 3  # pictures that do not decode, in the warning
SETTINGS = {"pictures", "picture_column", "caption_column"}  # for which `PictureSource.digest` stands in the settings of a stage


@dataclass(frozen=True)
class PictureSource:
    """The pictures that `config` names, to be used at the student's `sizes`. `where` names the source in messages."""

    config: AdversarialTraining
    where: str
    files: dict[str, Path]  # everything that is read, by name
    pictures: list[Picture]
    sizes: list[Size]

    @property
    def num_captions(self) -> int:
        """Number of different captions."""
        return len({picture.caption for picture in self.pictures})

    @cached_property
    def digest(self) -> str:
        """Digest over the contents of all files, their names, and the columns that are read."""
        contents = from_first(lambda: [[name, sha256(file)] for name, file in self.files.items()])
        return hash_json([contents, self.config.picture_column, self.config.caption_column])

    def rows_by_size(self) -> dict[Size, list[int]]:
        """Rows of `pictures` for each size: those whose proportions are nearest to the size's, by ratio.

        A picture that does not decode is with the first size. Raises UsageError for a file that cannot be read.
        """
        rows: dict[Size, list[int]] = {size: [] for size in self.sizes}
        for row, picture in enumerate(self.pictures):
            wanted = self._proportions(picture) if len(self.sizes) > 1 else 1.0
            distances = {size: abs(math.log(size.width / size.height / wanted)) for size in self.sizes}
            for size, distance in distances.items():
                if distance == min(distances.values()):
                    rows[size].append(row)
        return rows

    def read(self, picture: Picture) -> bytes | Tensor:
        """The bytes of the picture's file, or its latent. Raises UsageError for a file that cannot be read."""
        try:
            return picture.read()
        except OSError as error:
            raise UsageError(f"{self.where}: {picture.name} cannot be read ({error}); mend it, or take it out") from error

    def _proportions(self, picture: Picture) -> float:
        data, first = self.read(picture), self.sizes[0]
        assert isinstance(data, bytes)
        try:
            return proportions(data)
        except Exception:  # of any type: files may hold anything
            return first.width / first.height


def picture_source(stage: Stage, matching: MatchingTraining, sizes: list[Size]) -> PictureSource | None:
    """The pictures that the adversarial term of `matching` needs; None where it needs none. No picture is read.

    Raises UsageError for a source that is missing, cannot be read, lacks a column or has fewer pictures than a batch.
    """
    config, section = matching.adversarial, f"{stage.name}.matching"
    if config.pictures is None:
        return None
    where = f"{section}.adversarial.pictures={config.pictures}"
    if not matching.needs_pictures:
        warn(f"{where} has no effect without an adversarial term; --set {section}.node_adversarial=[1]")
        return None
    if len(sizes) > 1 and config.pictures.suffix == ".safetensors":
        raise UsageError(f"{where} holds latents of one size; name pictures, or set {stage.name}.sizes=[]")
    shape = stage.family.latent_shape(configs_in(stage.source.path, stage.family), sizes[0])
    listing = Listing(where, f"{section}.adversarial", config, shape)
    files = listing.files(config.pictures)
    pictures = list(listing.of(files))
    if not pictures:
        raise UsageError(f"{where} has no pictures; name a folder of {', '.join(FORMATS)}, or a .tar, .parquet or .safetensors file")
    if len(pictures) < matching.batch:
        raise UsageError(f"{where} has {len(pictures)} pictures, fewer than {section}.batch={matching.batch}; add some, or lower the batch")
    return PictureSource(config, where, files, pictures, sizes)


def real_pictures(
    stage: Stage, source: PictureSource, matching: MatchingTraining, sampler: Sampler, text: Pipeline, cache: Path
) -> list[RealPictures]:
    """Latents of the pictures of `source`, encoded by the stage's VAE and kept in `cache`, with their captions, encoded by `text`.

    One entry per size of the student's. Pictures that do not decode are left out; a warning counts and names them. Raises UsageError when
    fewer than a batch are left for a size.
    """
    from flashgen.models.pipeline import load_pipeline
    from flashgen.randomness import generator
    from flashgen.runtime.processes import from_first
    from flashgen.training.pictures import RealPictures

    pipe, pictures = load_pipeline(stage.source.path, weights="vae", device=stage.device), source.pictures
    rows_by_size: dict[Size, list[int]] = from_first(source.rows_by_size)
    if len(source.sizes) > 1:
        for size, nearest in rows_by_size.items():
            _check_count(stage, source, matching, len(nearest), f"are nearest to the proportions of size {size}")
    encoded = {size: _encoded(stage, source, pipe, size, nearest, cache) for size, nearest in rows_by_size.items()}
    present = {size: [rows_by_size[size][row] for row in rows.tolist()] for size, (_, rows, _) in encoded.items()}
    if skipped := sorted(set(range(len(pictures))).difference(*present.values())):
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        names = ", ".join(pictures[row].name for row in skipped[:NAMED])
        warn(f"{source.where}: {len(skipped)} of {len(pictures)} pictures do not decode and are left out: {names}{more}")
    real = []
    for size, (latents, rows, mappings) in encoded.items():
        _check_count(stage, source, matching, len(rows), f"decode for size {size}" if len(source.sizes) > 1 else "decode")
        pool = text_pool(stage, [pictures[row].caption for row in present[size]], source.num_captions, text, sampler, cache)
        dropped = pool.dropping(stage.recipe.distill.encoder_drop, generator(stage.seed, DROP_STREAM))
        real.append(RealPictures(latents, rows, dropped, mappings))
    return real


def _encoded(
    stage: Stage, source: PictureSource, pipe: Pipeline, size: Size, rows: list[int], cache: Path
) -> tuple[Tensor, Tensor, tuple[mmap.mmap, ...]]:
    """`write_latents` of the pictures at `rows`, drawn in `size`."""
    from flashgen.models.sample import latent_shape
    from flashgen.training.pictures import write_latents

    how = [source.digest, size, *([source.sizes] if len(source.sizes) > 1 else [])]  # which pictures there are depends on the other sizes
    folder = cache / cache_name("pictures", stage.source, ["vae"], how)
    return write_latents(lambda row: _latent(pipe, source.pictures[rows[row]], source, size), len(rows), latent_shape(pipe, size), folder)


def _check_count(stage: Stage, source: PictureSource, matching: MatchingTraining, count: int, which: str) -> None:
    if count < matching.batch:
        raise UsageError(
            f"{source.where}: {count} of {len(source.pictures)} pictures {which}, fewer than a batch of {matching.batch}; add pictures, "
            f"or lower {stage.name}.matching.batch"
        )


def add_pictures(plan: Plan, footprint: Footprint, source: PictureSource | None) -> None:
    """Add the latents of `source` to the disk of `plan`, and the phase that encodes them. Captions are counted with the prompts."""
    if source is None:
        return
    shares = len({size.width / size.height for size in source.sizes})  # a picture is drawn in all sizes of its proportions
    latents = 2.0 * len(source.pictures) * sum(footprint.forward(size).latent for size in source.sizes) / shares
    plan.disk, plan.cached = plan.disk + latents, plan.cached + latents
    if source.pictures[0].name.endswith(".safetensors"):
        return
    encoders, multiply_adds = zip(*(footprint.picture_encoding(size) for size in source.sizes), strict=True)
    plan.memory["pictures"] = plan.memory["embed"] | max(
        encoders, key=lambda parts: parts["activations"]
    )  # text encoders are loaded already
    plan.work = {**plan.work, "fp32": plan.work.get("fp32", 0.0) + len(source.pictures) * sum(multiply_adds) / shares}


def _latent(pipe: Pipeline, picture: Picture, source: PictureSource, size: Size) -> Tensor | None:
    """Latent [C, h, w] of `picture` in `size`, None where it does not decode. Raises UsageError for a file that cannot be read."""
    import torch

    value = source.read(picture)
    if isinstance(value, torch.Tensor):
        return value
    try:
        pixels = decode(value, size)
    except Exception:  # of any type: files may hold anything
        return None
    return pipe.family.to_latents(pipe.vae, torch.from_numpy(from_uint8(pixels)).to(pipe.device))[0]
