"""The bars of `make shapes`: the students of artifacts/shapes against their teacher, as a table and in bars.json.

    python -m benchmarks.shapes artifacts/shapes

Prompts and noise are of a stream that no stage draws from; intervals are 95 %, over prompts: bootstrapped, those of distances
from the jackknife.
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
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.models.sample import latent_shape, load_pipeline
from flashgen.progress import say, warn
from flashgen.recipe.load import load
from flashgen.shapes.scene import TASKS
from flashgen.stages.checks import missing_compiler
from flashgen.training.matching import Matcher
from flashgen.training.prompts import prompt_pool
from flashgen.training.trajectories import Replay

PER_TASK, FEW = 480, 60  # with 100 the interval of a ratio is .026 either way, with 480 .012
STUDENTS = ("student", "finetuned", "student-2", "student-8")


def scores(artifact: Artifact, ruler: Ruler, folder: Path, network: nn.Module | None = None) -> dict[str, Any]:
    """Scores of one artifact's transformer, kept by its digest part by part; `network` is that one, where it is loaded already."""
    sampler, name = artifact.manifest.sampler, artifact.manifest.digest.removeprefix("sha256:")[:12]
    assert sampler is not None
    found: dict[str, Any] = {}
    for part, measure in (("verdicts", ruler.verdicts), ("spread", ruler.spread)):
        path = folder / f"{name}-{part}.json"
        if not path.exists():
            network = network or load_pipeline(artifact.path).transformer
            keep(path, measure(network, sampler))
        found |= json.loads(path.read_text())
    return found


def forwards_per_update(teacher: Artifact, student: Artifact) -> float:
    """F a sample of a student update of the recipe, counted by hooks; the mean of several, as nodes are drawn and cost what they weigh."""
    recipe, sampler, pipe = load("shapes"), student.manifest.sampler, load_pipeline(teacher.path)
    assert sampler is not None
    config, updates = recipe.distill.matching.model_copy(update={"proxy_warmup": 0}), 8
    network = copy.deepcopy(pipe.transformer).requires_grad_(True)
    shape = latent_shape(pipe, sampler.size_px)
    pool = prompt_pool(pipe, 4, 0, sampler.t5_tokens)
    replay = Replay.along(torch.zeros(4, len(sampler.sigmas), *shape), pool)
    matcher = Matcher("cost", network, pipe.transformer, pool, sampler.sigmas, config, shape, 0, t5_drop=0.0, replay=replay)
    with Meter().on(matcher.student, matcher.proxy, matcher.teacher) as meter:
        for step in range(updates):
            matcher.update(step)
    return meter.forwards / (config.batch * updates)


def main(out: Path) -> None:
    teacher = open_artifact("shapes", ("teacher",))
    assert teacher.manifest.sampler is not None
    folder = out / "bars" / f"{teacher.manifest.digest[:12]}-{PER_TASK}-{FEW}"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(teacher.path)
    if load("shapes").distill.compile and not missing_compiler():
        pipe.transformer.compile()  # three sets of pictures in 28 guided steps are most of the work
    ruler = Ruler(pipe, teacher.manifest.sampler, folder, PER_TASK, FEW)
    found = {"teacher": scores(teacher, ruler, folder, ruler.teacher)}
    there = [name for name in STUDENTS if (out / name / "latest").exists()]
    if missing := sorted(set(STUDENTS) - set(there)):
        warn(f"{', '.join(missing)} not made yet, so their bars are missing; `make shapes` makes them")
    for name in there:
        found[name] = scores(open_artifact(out / name, ("student",)), ruler, folder)
    passed = {name: np.array(row["passed"], float) for name, row in found.items()}
    bars = []
    for name in there:
        value, low, high = ratio_interval(passed[name], passed["teacher"])
        bars.append(Bar(f"{name}: composition / teacher's", value, ">= 0.95" if name == "student-2" else ">= 1.00", low, high))
    for name in there[:2]:
        value, low, high = ratio_of_distances(found[name], found["teacher"], "fd_true")
        bars.append(Bar(f"{name}: Frechet distance to true / teacher's", value, "<= 1.25", low, high))
    for name in there:
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
