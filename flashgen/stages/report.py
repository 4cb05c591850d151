"""What every model-making stage adds to its version: curves, a sample grid and a composition score."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, Draft
from flashgen.device.png import sheet
from flashgen.errors import NumericsError
from flashgen.models.sample import load_pipeline, sample
from flashgen.processes import rank
from flashgen.progress import say
from flashgen.recipe.schema import BenchRecipe, Recipe
from flashgen.shapes.scene import prompt_set
from flashgen.shapes.verify import composition, judge
from flashgen.stages.prompts import own_prompts
from flashgen.training.loop import Watch

VALIDATION_SEED = 1000  # prompts that stages may look at; `bench` judges on others
CHOICE_SEED = 2000  # prompts on which `distill` and `finetune` choose, so that the validation score stays honest


def verdicts(pipe: StableDiffusion3Pipeline, sampler: Sampler, bench: BenchRecipe, picture: Path | None = None) -> NDArray[np.bool_]:
    """Which of the choice prompts a pipeline paints right, task by task, [6 per_task]; `picture` gets a grid of them."""
    requests = prompt_set(CHOICE_SEED, bench.per_task)
    images = sample(pipe, sampler, [r.caption() for r in requests], list(range(len(requests))), batch=bench.batch)
    if picture:
        save_grid(images, picture)
    return np.array([judge(image, request).passed for image, request in zip(images, requests, strict=True)])


def watcher(pipe: StableDiffusion3Pipeline, sampler: Sampler, recipe: Recipe, work: Path) -> Watch:
    """For trainings: a network in place of the pipeline's own draws a grid into `work/samples`, and is judged on the choice prompts.

    Without a judge (`bench.per_task` 0) the grid is of the first eight of the recipe's own prompts, or of the shapes world's.
    """
    bench, prompts = recipe.bench, (own_prompts(recipe) or [r.caption() for r in prompt_set(CHOICE_SEED, 2)])[:8]

    def watch(name: str, transformer: nn.Module) -> float | None:
        own, pipe.transformer = pipe.transformer, transformer
        try:
            picture = work / "samples" / f"{name}.png"
            if bench.per_task:
                return float(verdicts(pipe, sampler, bench, picture).mean())
            save_grid(sample(pipe, sampler, prompts, list(range(len(prompts))), batch=bench.batch), picture)
            return None
        finally:
            pipe.transformer = own

    return watch


def finish(draft: Draft, sampler: Sampler, bench: BenchRecipe, metrics: dict[str, object] | None = None, least: float = 0.0) -> Artifact:
    """Sample the written pipeline on validation prompts, judge it, and publish; with `bench.per_task` 0 publish it unseen.

    Raises NumericsError, and publishes nothing, when composition is below `least`.
    """
    if (draft.work / "stats.jsonl").exists():
        shutil.copyfile(draft.work / "stats.jsonl", draft.path / "stats.jsonl")
    if (looks := sorted((draft.work / "samples").glob("*.png"))) or bench.per_task:
        (draft.path / "samples").mkdir()
    for picture in looks:
        shutil.copyfile(picture, draft.path / "samples" / picture.name)
    if not bench.per_task:
        return draft.publish(sampler=sampler, metrics=metrics)
    requests = prompt_set(VALIDATION_SEED, bench.per_task)
    images = sample(load_pipeline(draft.path), sampler, [r.caption() for r in requests], list(range(len(requests))), batch=bench.batch)
    scores = composition(list(images), requests)
    save_grid(images, draft.path / "samples" / "validation.png")
    say(f"composition on {len(requests)} validation prompts: {scores['overall']:.3f}")
    if scores["overall"] < least:
        raise NumericsError(
            f"composition {scores['overall']:.3f} is below the floor of {least:.3f}, restructure.floor of what the student had before; "
            "train longer with --set restructure.iterations=N, or publish it nevertheless with --set restructure.floor=0"
        )
    return draft.publish(sampler=sampler, metrics={"composition": scores, **(metrics or {})})


def save_grid(images: NDArray[np.uint8], path: Path) -> None:
    """At most 48 of the pictures [N, H, W, 3], evenly picked, in a PNG that the first process writes."""
    if rank() == 0:
        path.parent.mkdir(exist_ok=True)
        shown = images[:: max(1, len(images) // 48)][:48]
        Image.fromarray(sheet(shown, min(8, len(shown)))).save(path)
