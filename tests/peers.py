"""diffusers' own pipeline, to compare with."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from flashgen.models.pipeline import Pipeline


def in_diffusers(pipe: Pipeline) -> StableDiffusion3Pipeline:
    """diffusers' pipeline of the same networks and tokenizers (the same objects)."""
    from flashgen.families.sd3.build import scheduler

    return StableDiffusion3Pipeline(**{**pipe.parts, "scheduler": pipe.parts.get("scheduler") or scheduler()})
