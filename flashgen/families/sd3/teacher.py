"""Training a small SD3-class teacher of a world from nothing: autoencoder, text encoders, then the transformer on the frozen rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashgen.artifact.manifest import Sampler
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.pretraining import train_encoders
from flashgen.families.sd3.sampling import teacher_sampler
from flashgen.families.sd3.specs import SPECS
from flashgen.models.pipeline import Pipeline
from flashgen.pixels import Size
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.recipe.teacher import TeacherRecipe
from flashgen.training.autoencoder import encode_pictures, train_autoencoder
from flashgen.training.flow import train_flow
from flashgen.worlds.base import TeacherData


def train_teacher(
    data: TeacherData, held_out: Sequence[str], config: TeacherRecipe, seed: int, work: Path, checkpoint: CheckpointRecipe
) -> tuple[Pipeline, Sampler]:
    """A trained pipeline in memory and its sampler; resumes from `work`."""
    spec = SPECS["shapes"]
    pipe = build_pipeline(spec, seed, data.words)
    side = int(spec.vae["sample_size"])
    sampler = teacher_sampler(spec.clip_tokens, config.flow.t5_tokens, Size(side, side), guidance=config.guidance)
    train_autoencoder(pipe.vae, data, config.autoencoder, seed, work, checkpoint)
    latents, captions = encode_pictures(pipe, data, config.flow.samples, seed, work)
    train_encoders(pipe, data, held_out, config.encoders, sampler, seed, work)
    ema = train_flow(pipe, latents, captions, config.flow, sampler, seed, work, checkpoint)
    ema.copy_to(pipe.transformer)
    return pipe, sampler
