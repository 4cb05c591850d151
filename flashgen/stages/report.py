"""What every model-making stage adds to its version: curves, a sample grid and a composition score."""

from __future__ import annotations

import shutil

import numpy as np
from PIL import Image

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, Draft
from flashgen.models.sample import load_pipeline, sample
from flashgen.progress import say
from flashgen.recipe.schema import BenchRecipe
from flashgen.shapes.scene import prompt_set
from flashgen.shapes.verify import composition

VALIDATION_SEED = 1000  # prompts that stages may look at; `bench` judges on others


def finish(draft: Draft, sampler: Sampler, bench: BenchRecipe, metrics: dict[str, object] | None = None) -> Artifact:
    """Sample the written pipeline on validation prompts, judge it, and publish."""
    requests = prompt_set(VALIDATION_SEED, bench.per_task)
    images = sample(load_pipeline(draft.path), sampler, [r.caption() for r in requests], list(range(len(requests))), batch=bench.batch)
    scores = composition(list(images), requests)
    (draft.path / "samples").mkdir()
    Image.fromarray(grid(images[:: max(1, len(images) // 48)][:48])).save(draft.path / "samples" / "validation.png")
    if (draft.work / "stats.jsonl").exists():
        shutil.copyfile(draft.work / "stats.jsonl", draft.path / "stats.jsonl")
    say(f"composition on {len(requests)} validation prompts: {scores['overall']:.3f}")
    return draft.publish(sampler=sampler, metrics={"composition": scores, **(metrics or {})})


def grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """Pictures [N, H, W, 3] side by side, row after row."""
    rows = [np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images) // columns * columns, columns)]
    return np.concatenate(rows) if rows else images[0]
