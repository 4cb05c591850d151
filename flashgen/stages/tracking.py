"""Settings of the log of a stage's trainings: the trackers, and what a step costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flashgen.errors import MachineError
from flashgen.models.footprint import Footprint
from flashgen.recipe.distillation import MatchingTraining, Regression

if TYPE_CHECKING:
    from flashgen.stages.base import Stage
    from flashgen.training.log import StepCost

FORWARD_AND_BACKWARD, WITH_CHECKPOINTING = 3, 4  # cost of a training pass, in forward passes


def trainings(stage: Stage) -> Mapping[str, Any]:
    """Recipe sections of the trainings that `stage` may run, by the name of their rows in `stats.jsonl`."""
    recipe = stage.recipe
    by_stage: dict[str, dict[str, Any]] = {
        "teacher": {"autoencoder": recipe.teacher.autoencoder, "encoders": recipe.teacher.encoders, "teacher": recipe.teacher.flow},
        "distill": {name: getattr(recipe.distill, name) for name in ("trajectory", "on_policy", "matching")},
        "finetune": dict.fromkeys(("high", "low", "control"), recipe.finetune.matching),
        "restructure-encoder": dict.fromkeys(("recovery", "embedding"), recipe.restructure),
    }
    return by_stage.get(stage.name, {})


def check_trackers(stage: Stage) -> None:
    """Raises MachineError when the recipe asks a stage that trains for a tracker that is not installed."""
    if not trainings(stage) or not (trackers := stage.recipe.log.trackers):
        return
    from accelerate.tracking import get_available_trackers

    installed = {str(tracker) for tracker in get_available_trackers()}
    if missing := [tracker for tracker in trackers if tracker not in installed]:
        mend = f'pip install {" ".join(missing)} (or "flashgen[track]"), or leave it out with --set log.trackers=[]'
        raise MachineError(f"log.trackers: {', '.join(missing)} is not installed; {mend}")


@contextmanager
def tracked(stage: Stage, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let the trainings that run inside log as the recipe says; `settings` are the stage's, for trackers."""
    if not trainings(stage):
        yield
        return
    from flashgen.training.log import LOGGING, Logging

    token = LOGGING.set(Logging(stage.recipe.log, f"{stage.name} {stage.recipe.name}", settings, step_costs(stage)))
    try:
        yield
    finally:
        LOGGING.reset(token)


def step_costs(stage: Stage) -> dict[str, StepCost]:
    """Cost of one step of each training, by its name. Multiply-adds are those of `stage.plan`, which knows regressions and matching."""
    from flashgen.training.log import StepCost

    learning = learning_cost(stage)
    distill = stage.recipe.distill if stage.name == "distill" else None
    costs = {}
    for name, training in trainings(stage).items():
        passes, first = 0.0, 0
        if isinstance(training, MatchingTraining):
            steps = distill.steps if distill else stage.sampler.num_steps
            passes, first = round_forwards(training, steps, learning)[1], training.fake_score_warmup
        elif isinstance(training, Regression):
            passes = learning
        sizes = distill.all_sizes if distill else [None]
        one = fmean(Footprint(stage.source).forward(size).multiply_adds for size in sizes) if passes else 0.0
        costs[name] = StepCost(training.batch, passes * training.batch * one, first)
    return costs


def learning_cost(stage: Stage) -> int:
    """Cost of a pass that learns in the trainings of `stage`, in forward passes."""
    return WITH_CHECKPOINTING if stage.recipe.compute.activation_checkpointing else FORWARD_AND_BACKWARD


def _term_forwards(matching: MatchingTraining, steps: int, learning: int) -> float:
    """Forward passes per sample of the terms beside matching: the adversarial one and its heads, and trajectory guidance."""
    weights = matching.node_weights(steps)
    return (learning + 2) * sum(map(bool, weights["adversarial"])) / steps + learning * any(weights["trajectory"])


def round_forwards(matching: MatchingTraining, steps: int, learning: int) -> tuple[int, float]:
    """Forward passes per sample of (a warm-up round, another round) of a student of `steps` steps; a pass that learns costs `learning`.

    Skip-layer guidance counts as one pass, although only samples at its noise levels take it.
    """
    fake_score = steps + learning * matching.fake_score_updates
    scores = 3 + (matching.augmentation == "decoupled") + (matching.skip_layers is not None)
    return fake_score, fake_score + learning + scores + _term_forwards(matching, steps, learning)


def matching_forwards(matching: MatchingTraining, steps: int, learning: int) -> float:
    """Forward passes per sample of a matching training."""
    warmup, other = round_forwards(matching, steps, learning)
    return matching.fake_score_warmup * warmup + matching.iterations * other if matching.iterations else 0
