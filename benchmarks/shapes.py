"""The bars of `make shapes`: compares the students of artifacts/shapes with their teacher; prints a table and writes bars.json.

    python -m benchmarks.shapes artifacts/shapes

No stage uses these prompts and this noise. Intervals are 95 %, over prompts: by bootstrap, for distances by jackknife.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.scores import Bar, Meter, Ruler, keep, ratio_interval, ratio_of_distances, report
from flashgen import worlds
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import latent_shape
from flashgen.progress import say, warn
from flashgen.recipe.load import load
from flashgen.stages.inputs import open_input, sampler_of
from flashgen.stages.trainings import missing_compiler
from flashgen.training.cache import Replay
from flashgen.training.matching import Matcher, Roles, Task
from flashgen.training.prompts import prompt_pool, training_prompts
from flashgen.worlds.shapes.scene import TASKS

PER_TASK, FEW = 480, 60  # half the interval of a ratio is .026 with 100 prompts per task, .012 with 480
STUDENTS = ("student", "finetuned", "student-2", "student-8")


def scores(artifact: Artifact, ruler: Ruler, folder: Path, network: nn.Module | None = None) -> dict[str, Any]:
    """Scores of one artifact's transformer, saved under its digest in two parts; `network` is the transformer where it is loaded."""
    sampler, name = sampler_of(artifact), artifact.manifest.digest[:12]
    found: dict[str, Any] = {}
    for part, measure in (("verdicts", ruler.verdicts), ("spread", ruler.spread)):
        path = folder / f"{name}-{part}.json"
        if not path.exists():
            network = network or load_pipeline(artifact.path).transformer
            keep(path, measure(network, sampler))
        found |= json.loads(path.read_text())
    return found


def forwards_per_update(teacher: Artifact, student: Artifact) -> float:
    """F per sample of a student update of the recipe, counted by hooks: the mean of several, because nodes differ in cost."""
    recipe, sampler, pipe = load("shapes"), sampler_of(student), load_pipeline(teacher.path)
    config, updates = recipe.distill.matching.model_copy(update={"fake_score_warmup": 0}), 8
    network = copy.deepcopy(pipe.transformer).requires_grad_(True)
    shape = latent_shape(pipe, sampler.size_px)
    pool = prompt_pool(training_prompts(worlds.get("shapes"), None, 4, 0), pipe, sampler)
    replay = Replay.from_states(torch.zeros(4, len(sampler.sigmas), *shape), pool)
    task = Task("cost", pool, sampler.sigmas, shape, 0, 0.0, replay)
    matcher = Matcher(task, Roles(network, pipe.transformer), config, pipe.family)
    with Meter().on(matcher.student, matcher.fake_score, matcher.teacher) as meter:
        for step in range(updates):
            matcher.update(step)
    return meter.forwards / (config.batch * updates)


def main(out: Path) -> None:
    """Measure, print and write the bars of the students in `out`."""
    teacher = open_input("shapes", ("teacher",))
    folder = out / "bars" / f"{teacher.manifest.digest[:12]}-{PER_TASK}-{FEW}"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(teacher.path)
    if load("shapes").distill.compile and not missing_compiler():
        pipe.transformer.compile()  # most of the work is three sets of pictures in 28 guided steps
    ruler = Ruler(pipe, sampler_of(teacher), folder, PER_TASK, FEW)
    found = {"teacher": scores(teacher, ruler, folder, ruler.teacher)}
    present = [name for name in STUDENTS if (out / name / "latest").exists()]
    if missing := sorted(set(STUDENTS) - set(present)):
        warn(f"{', '.join(missing)} are missing, and so are their bars; make them with: make shapes")
    for name in present:
        found[name] = scores(open_artifact(out / name, ("student",)), ruler, folder)
    passed = {name: np.array(row["passed"], float) for name, row in found.items()}
    bars = []
    for name in present:
        value, low, high = ratio_interval(passed[name], passed["teacher"])
        bars.append(Bar(f"{name}: composition / teacher's", value, ">= 0.95" if name == "student-2" else ">= 1.00", low, high))
    for name in present[:2]:
        value, low, high = ratio_of_distances(found[name], found["teacher"], "fd_true")
        bars.append(Bar(f"{name}: Frechet distance to true / teacher's", value, "<= 1.25", low, high))
    for name in present:
        value, low, high = ratio_of_distances(found[name], found["teacher"], "diversity")
        bars.append(Bar(f"{name}: diversity / teacher's", value, ">= 0.80", low, high))
    bars.append(Bar("forwards of one student update, F", forwards_per_update(teacher, open_artifact(out / "student")), "<= 16"))
    tasks = {name: dict(zip(TASKS, p.reshape(len(TASKS), -1).mean(1).round(3).tolist(), strict=True)) for name, p in passed.items()}
    for name, row in found.items():
        say(f"{name}: {np.mean(row['passed']):.3f} {tasks[name]} FD true {row['fd_true']:.2f} FD teacher {row['fd_teacher']:.2f} "
            f"recall {row['recall_true']:.2f} diversity {row['diversity']:.2f}")  # fmt: skip
    report(bars, out / "bars.json", "make shapes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
