"""Files that every model-making stage adds to its version: curves, sample grids and, where there is a judge, scores."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from flashgen.artifact.draft import Draft
from flashgen.artifact.manifest import Sampler
from flashgen.errors import NumericsError
from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.judges.world import WorldJudge
from flashgen.models.pipeline import Pipeline, load_pipeline
from flashgen.models.sample import sample
from flashgen.png import sheet
from flashgen.progress import say
from flashgen.recipe.schema import BenchRecipe
from flashgen.runtime.accelerator import drawing_dtype
from flashgen.runtime.processes import from_first, rank
from flashgen.stages.prompts import UNJUDGED_PICTURES

if TYPE_CHECKING:
    from flashgen.stages.base import Result, Stage

VALIDATION_SEED = 1000  # prompts on which stages report a score; `bench` judges on others
CHOICE_SEED = 2000  # prompts on which `distill` and `finetune` choose, so that the validation score stays unbiased
GRID_PICTURES, GRID_COLUMNS = 48, 8
NOT_JUDGED = "not judged"


def grid_prompts(stage: Stage, seed: int) -> list[str]:
    """Prompts of one sample grid: the world's for `seed`, or the first few of the recipe's held-out ones; none with `bench.per_task` 0.

    Where a judge scores pictures of the recipe's own prompts, those with an odd place are for choices and the others for validation.
    """
    count = stage.num_validation_pictures
    if stage.world is not None:
        return stage.world.prompts(seed, stage.recipe.bench.per_task) if count else []
    prompts = stage.prompts.validation if stage.prompts else []
    if stage.judges and len(prompts) > 1:
        prompts = prompts[seed == CHOICE_SEED :: 2]
    return prompts[:count]


def judge(stage: Stage, pipe: Pipeline, sampler: Sampler, picture: Path | None = None) -> Judgement:
    """Judge `pipe` on the choice prompts in the first process, for all of them; `picture` gets a grid of the pictures."""
    assert stage.judge is not None
    prompts = grid_prompts(stage, CHOICE_SEED)
    images = draw(pipe, sampler, prompts, stage.recipe.bench)
    if picture:
        save_grid(images, picture)
    asked = stage.judge

    def ask() -> tuple[Judgement, bool]:
        return score(asked, images, prompts), asked.higher_is_better

    judgement, asked.higher_is_better = from_first(ask)  # a program says so with its first score
    return judgement


def score(judge: Judge, images: NDArray[np.uint8], prompts: list[str]) -> Judgement:
    """Judge pictures that `draw` has drawn."""
    return judge.judge(Drawn(images, prompts, list(range(len(prompts)))))


def draw(pipe: Pipeline, sampler: Sampler, prompts: list[str], bench: BenchRecipe) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3] of `prompts`, picture i from seed i."""
    return sample(pipe, sampler, prompts, list(range(len(prompts))), batch=bench.batch)


class Validator:
    """Draws a grid with a network in the middle of its training, in place of the pipeline's own transformer, and judges it.

    Grids go to `work/samples/NAME.png`. Without a judge they show the first few of the recipe's validation prompts, or of the world's.
    """

    def __init__(self, stage: Stage, pipe: Pipeline, sampler: Sampler, work: Path) -> None:
        self.stage, self.pipe, self.sampler, self.work = stage, pipe, sampler, work

    def __call__(self, name: str, transformer: nn.Module) -> float | None:
        """Score of `transformer`, more is better, or None where nothing judges."""
        before, self.pipe.transformer = self.pipe.transformer, transformer
        try:
            picture = self.work / "samples" / f"{name}.png"
            if self.stage.judges:
                assert self.stage.judge is not None
                return self.stage.judge.better(judge(self.stage, self.pipe, self.sampler, picture).mean)
            world = self.stage.world
            own = self.stage.prompts
            prompts = own.validation if own else world.prompts(CHOICE_SEED, 2) if world else []
            save_grid(draw(self.pipe, self.sampler, prompts[:UNJUDGED_PICTURES], self.stage.recipe.bench), picture)
            return None
        finally:
            self.pipe.transformer = before


def validate(stage: Stage, draft: Draft, result: Result) -> dict[str, Any]:
    """Draw validation pictures with the written networks into the draft and judge them; returns the metrics to store.

    Scores have the name of their metric; what they depend on is beside them in `judges`, unless it is the world. With `bench.per_task` 0
    nothing is drawn. Raises NumericsError when the score is worse than `result.floor` allows.
    """
    copy_records(draft)
    prompts, sampler = grid_prompts(stage, VALIDATION_SEED), result.sampler
    if not prompts or sampler is None:
        return {"composition": NOT_JUDGED}
    gc.collect()  # networks of the training that refer to themselves, as a checkpointed backbone does, are still on the accelerator
    images = draw(load_pipeline(draft.path, drawing_dtype(stage.device), device=stage.device), sampler, prompts, stage.recipe.bench)
    save_grid(images, draft.path / "samples" / "validation.png")
    if not stage.judges or stage.judge is None:
        return {"composition": NOT_JUDGED}
    judgement, metric = score(stage.judge, images, prompts), stage.judge.metric  # a program may name its metric
    say(f"{metric} on {len(prompts)} validation prompts: {judgement.overall:.3f}")
    if result.floor:
        check_floor(stage.judge, judgement.overall, *result.floor)
    known = {} if isinstance(stage.judge, WorldJudge) else {"judges": {metric: stage.judge.identity() | {"pictures": len(prompts)}}}
    return {metric: judgement.scores, **known}


def copy_records(draft: Draft) -> None:
    """Copy the curves and the grids of the trainings into the draft."""
    if (draft.work / "stats.jsonl").exists():
        shutil.copyfile(draft.work / "stats.jsonl", draft.path / "stats.jsonl")
    for picture in sorted((draft.work / "samples").glob("*.png")):
        (draft.path / "samples").mkdir(exist_ok=True)
        shutil.copyfile(picture, draft.path / "samples" / picture.name)


def check_floor(judge: Judge, score: float, before: float, share: float, setting: str = "restructure.iterations") -> None:
    """Raises NumericsError when `score` is worse than `before` by more than 1 - `share` of it; `setting` is the training's length."""
    least = judge.better(before) - (1 - share) * abs(before)
    if judge.better(score) < least:
        raise NumericsError(
            f"{judge.metric} {score:.3f} is {'below' if judge.higher_is_better else 'above'} the floor of {judge.better(least):.3f}, "
            f"restructure.floor={share:g} of the student's own {before:.3f}; train longer with --set {setting}=N, or publish "
            "it nevertheless with --set restructure.floor=0"
        )


def save_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Write at most 48 of the pictures [N, H, W, 3], evenly picked, as one PNG; the first process alone writes."""
    if rank() == 0 and len(images):
        path.parent.mkdir(exist_ok=True)
        shown = images[:: max(1, len(images) // GRID_PICTURES)][:GRID_PICTURES]
        Image.fromarray(sheet(shown, min(GRID_COLUMNS, len(shown)))).save(path)
