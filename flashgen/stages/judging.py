"""The judge of a stage, and the teacher's pictures that some judges compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashgen.artifact.store import Artifact
from flashgen.judges.base import Judge, Pictures
from flashgen.judges.spec import open_judge
from flashgen.judges.teacher import Draw
from flashgen.progress import say
from flashgen.recipe.schema import Recipe
from flashgen.stages.inputs import sampler_of, teacher_of
from flashgen.stages.prompts import UNJUDGED_PICTURES

if TYPE_CHECKING:
    from flashgen.stages.base import Stage
    from flashgen.worlds.base import World


def judge_key(stage: Stage) -> dict[str, Any]:
    """The part of a stage's settings on which a choice by score depends."""
    bench, judge = stage.recipe.bench, stage.judge
    world = {"per_task": bench.per_task} if stage.world is not None else {}
    return world | ({"judge": judge.identity(), "pictures": bench.pictures} if judge and stage.recipe.judge else {})


def count_pictures(stage: Stage) -> int:
    """Number of pictures that validate a stage's result: the world's prompts, or some of the recipe's own, more where a judge scores them.

    Of the recipe's own prompts a judge gets at most half, since choices and validations use different ones.
    """
    bench = stage.recipe.bench
    if stage.world is not None:
        return len(stage.world.tasks) * bench.per_task
    own = len(stage.prompts.validation if stage.prompts else [])
    most = min(bench.pictures, max(1, own // 2)) if stage.judge else UNJUDGED_PICTURES
    return min(most, own) if bench.per_task else 0


def judged_alike(judge: Judge, metrics: Mapping[str, Any]) -> bool:
    """Return True if the scores in a manifest's metrics are by `judge`, with the same weights or program; worlds' judges do not change."""
    known = metrics.get("judges", {}).get(judge.metric, {"metric": judge.metric})
    own = judge.identity()
    return {key: own[key] for key in own if key != "world"} == {key: known[key] for key in known if key != "pictures"}


def judge_of(source: Artifact | None, world: World | None, recipe: Recipe, device_name: str) -> Judge | None:
    """The judge that the recipe names, or that of `world`; None where nothing judges.

    The judge `teacher` compares with the teacher in the lineage of `source`, at the picture size of `source`.
    """

    def teacher() -> tuple[Draw, str]:
        assert source is not None
        artifact = teacher_of(source)
        at_size = sampler_of(artifact).model_copy(update={"size_px": sampler_of(source).size_px})

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
            from flashgen.models.pipeline import load_pipeline
            from flashgen.models.sample import sample
            from flashgen.runtime.accelerator import device_of, drawing_dtype

            device = device_of(device_name)
            pipe = load_pipeline(artifact.path, drawing_dtype(device), device=device)  # for these pictures alone
            return sample(pipe, at_size, list(prompts), list(seeds), batch=recipe.bench.batch)

        return draw, artifact.manifest.digest

    return open_judge(recipe.judge, world, teacher if source else None, recipe.bench.reference, recipe.bench.judge_timeout_s)


def score_floor(stage: Stage) -> tuple[float, float] | None:
    """(score of the input, `restructure.floor`), or None where there is no floor or nothing can be compared."""
    judge, metrics, floor = stage.judge, stage.source.manifest.metrics, stage.recipe.restructure.floor
    if not floor:
        return None
    scores = metrics.get(judge.metric) if judge and stage.judges else None
    before = scores.get("overall") if isinstance(scores, dict) else None
    if judge is None or not isinstance(before, float) or not judged_alike(judge, metrics):
        say("restructure.floor is not applied: the student or its successor is not judged, or not by the same judge")
        return None
    return before, floor
