"""Real pictures for the adversarial term: decoded, resized and encoded once by the VAE, kept as latents in the cache that runs share."""

from __future__ import annotations

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
from flashgen.stages.picture_files import FORMATS, Listing, Picture, decode
from flashgen.stages.planning import Plan
from flashgen.stages.trajectories import DROP_STREAM, cache_name, text_pool

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.models.pipeline import Pipeline
    from flashgen.training.pictures import RealPictures

NAMED = 3  # pictures that do not decode, in the warning
SETTINGS = {"pictures", "picture_column", "caption_column"}  # for which `PictureSource.digest` stands in the settings of a stage


@dataclass(frozen=True)
class PictureSource:
    """The pictures that `config` names, to be used with the `size` of the student's. `where` names the source in messages."""

    config: AdversarialTraining
    where: str
    files: dict[str, Path]  # everything that is read, by name
    pictures: list[Picture]
    size: Size

    @property
    def num_captions(self) -> int:
        """Number of different captions."""
        return len({picture.caption for picture in self.pictures})

    @cached_property
    def digest(self) -> str:
        """Digest over the contents of all files, their names, and the columns that are read."""
        contents = from_first(lambda: [[name, sha256(file)] for name, file in self.files.items()])
        return hash_json([contents, self.config.picture_column, self.config.caption_column])


def picture_source(stage: Stage, matching: MatchingTraining, size: Size) -> PictureSource | None:
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
    shape = stage.family.latent_shape(configs_in(stage.source.path), size)
    listing = Listing(where, f"{section}.adversarial", config, shape)
    files = listing.files(config.pictures)
    pictures = list(listing.of(files))
    if not pictures:
        raise UsageError(f"{where} has no pictures; name a folder of {', '.join(FORMATS)}, or a .tar, .parquet or .safetensors file")
    if len(pictures) < matching.batch:
        raise UsageError(f"{where} has {len(pictures)} pictures, fewer than {section}.batch={matching.batch}; add some, or lower the batch")
    return PictureSource(config, where, files, pictures, size)


def real_pictures(
    stage: Stage, source: PictureSource, matching: MatchingTraining, sampler: Sampler, text: Pipeline, cache: Path
) -> RealPictures:
    """Latents of the pictures of `source`, encoded by the stage's VAE and kept in `cache`, with their captions, encoded by `text`.

    Pictures that do not decode are left out; a warning counts and names them. Raises UsageError when fewer than a batch are left.
    """
    from flashgen.models.pipeline import load_pipeline
    from flashgen.models.sample import latent_shape
    from flashgen.randomness import generator
    from flashgen.training.pictures import RealPictures, write_latents

    pipe, pictures = load_pipeline(stage.source.path, weights="vae", device=stage.device), source.pictures
    folder = cache / cache_name("pictures", stage.source, ["vae"], [source.digest, source.size])

    def latent(row: int) -> Tensor | None:
        return _latent(pipe, pictures[row], source)

    latents, rows, mappings = write_latents(latent, len(pictures), latent_shape(pipe, source.size), folder)
    present = rows.tolist()
    if skipped := sorted(set(range(len(pictures))) - set(present)):
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        names = ", ".join(pictures[row].name for row in skipped[:NAMED])
        warn(f"{source.where}: {len(skipped)} of {len(pictures)} pictures do not decode and are left out: {names}{more}")
    if len(present) < matching.batch:
        raise UsageError(
            f"{source.where}: {len(present)} of {len(pictures)} pictures decode, fewer than a batch of {matching.batch}; add pictures, "
            f"or lower {stage.name}.matching.batch"
        )
    pool = text_pool(stage, [pictures[row].caption for row in present], source.num_captions, text, sampler, cache)
    drop = stage.recipe.distill.encoder_drop
    return RealPictures(latents, rows, pool.dropping(drop, generator(stage.seed, DROP_STREAM)), mappings)


def add_pictures(plan: Plan, footprint: Footprint, source: PictureSource | None) -> None:
    """Add the latents of `source` to the disk of `plan`, and the phase that encodes them. Captions are counted with the prompts."""
    if source is None:
        return
    latents = 2.0 * len(source.pictures) * footprint.forward(source.size).latent
    plan.disk, plan.cached = plan.disk + latents, plan.cached + latents
    if source.pictures[0].name.endswith(".safetensors"):
        return
    encoder, multiply_adds = footprint.picture_encoding(source.size)
    plan.memory["pictures"] = plan.memory["embed"] | encoder  # text encoders are loaded already
    plan.work = {**plan.work, "fp32": plan.work.get("fp32", 0.0) + len(source.pictures) * multiply_adds}


def _latent(pipe: Pipeline, picture: Picture, source: PictureSource) -> Tensor | None:
    """Latent [C, h, w] of `picture`, None where it does not decode. Raises UsageError for a file that cannot be read."""
    import torch

    try:
        value = picture.read()
    except OSError as error:
        raise UsageError(f"{source.where}: {picture.name} cannot be read ({error}); mend it, or take it out") from error
    if isinstance(value, torch.Tensor):
        return value
    try:
        pixels = decode(value, source.size)
    except Exception:  # of any type: files may hold anything
        return None
    return pipe.family.to_latents(pipe.vae, torch.from_numpy(from_uint8(pixels)).to(pipe.device))[0]
