"""The ablation table: one base student per seed, and ways to spend the same number of forward passes on it.

    python -m benchmarks.ablation artifacts/ablation --page docs/ablation.md      # `make ablation`

Each finished run is saved, so the same command resumes; the page and its JSON are written when all runs are done. The unit of cost is F,
one transformer forward pass of one sample; a backward pass is 2 F. The cost of one update of each row is measured by hooks.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from benchmarks.ablation_page import draw, page
from benchmarks.ablation_rows import BUDGET, EXPERTS, FEW, PER_TASK, ROWS, Bench, Task
from benchmarks.scores import keep
from flashgen.flow.grid import shifted_grid
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.stages.inputs import open_input, sampler_of

bench_of = lru_cache(maxsize=2)(Bench)


def start_worker() -> None:
    """Use one thread: two processes of one thread do more on two cores than one of two (docs/lab-log.md). End with the parent process."""
    torch.set_num_threads(1)

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def prepare(task: Task, rows: list[str]) -> None:
    """`Bench.prepare` in a worker."""
    bench_of(task).prepare(rows)


def run(task: Task, row: str) -> dict[str, Any]:
    """`Bench.run` in a worker, with its time."""
    start = time.monotonic()
    result = bench_of(task).run(row)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def score_teacher(task: Task) -> dict[str, Any]:
    """Scores of the teacher."""
    bench = bench_of(task)
    return bench.ruler.score(bench.teacher, bench.taught)


def cache(task: Task) -> None:
    """Compute and save the trajectories of the task's seed."""
    bench_of(task)


def make(missing: dict[Task, list[str]], kept: dict[str, Any], path: Path, workers: int) -> None:
    """Run the missing rows task by task, and save each run to `path` when it is done."""
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        seeds = list({task.seed: task for task in missing}.values())
        list(pool.map(cache, seeds))
        if not kept["teacher"]:
            kept["teacher"] = pool.submit(score_teacher, seeds[0]).result()
        tasks = list(missing)
        ready = pool.submit(prepare, tasks[0], missing[tasks[0]])
        for task, after in itertools.zip_longest(tasks, tasks[1:]):
            ready.result()
            if after:  # one process prepares the next task while others work on the rows of this one
                ready = pool.submit(prepare, after, missing[after])
            for future in as_completed([pool.submit(run, task, row) for row in missing[task]]):
                result = future.result()
                kept["runs"].append(result)
                keep(path, kept)
                say(f"{result['steps']} steps, seed {result['seed']}, {result['row']}: composition {np.mean(result['passed']):.3f}, "
                    f"FD true {result['fd_true']:.2f}, {result['seconds']:.0f} s")  # fmt: skip


def kept_runs(key: str, *paths: Path) -> dict[str, Any]:
    """The saved runs of `key` (a hash of teacher, recipe and budget) from the file in `paths` that has most of them."""
    files = [json.loads(path.read_text()) for path in paths if path.exists()]
    empty: dict[str, Any] = {"key": key, "teacher": None, "runs": []}
    return max([empty, *(kept for kept in files if kept["key"] == key)], key=lambda kept: len(kept["runs"]))


def main() -> None:
    """Run what is missing, then write the page, its numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for runs, weights and caches")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file; numbers and plot are written beside it")
    parser.add_argument("--teacher", default="shapes")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=BUDGET, help="F per sample that each row may spend")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    given = parser.parse_args()
    source, recipe = open_input(given.teacher, ("teacher",)), load(given.recipe)
    taught = sampler_of(source)
    if recipe.distill.strides or recipe.distill.compile or recipe.distill.start:
        raise SystemExit(f"{given.recipe} sets distill.strides, compile or start, which have no effect on the rows; leave them out")
    settings = [
        recipe.distill.model_dump(),
        recipe.finetune.model_dump(exclude={"allow_worse"}),
        recipe.bench.per_task,
        recipe.prompts_file,
    ]
    identity = json.dumps([source.manifest.digest, settings, given.budget, PER_TASK, FEW], default=str)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path, published = given.work / key / "runs.json", given.page.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = kept_runs(key, path, published)
    part = (given.steps, given.seeds, given.rows) != tuple(map(parser.get_default, ("steps", "seeds", "rows")))
    if part and published.exists() and json.loads(published.read_text())["key"] != key:
        raise SystemExit(
            f"{published} has runs of another recipe, budget or teacher, which a part of the table must not replace; name another --page"
        )
    done = {(r["steps"], r["seed"], r["row"]) for r in kept["runs"]}
    missing: dict[Task, list[str]] = {}
    for steps, seed in itertools.product(given.steps, given.seeds):
        one_branch = shifted_grid(steps, taught.shift)[-2] > recipe.finetune.split
        rows = [row for row in given.rows if (steps, seed, row) not in done and not (one_branch and row in EXPERTS)]
        if rows:
            missing[Task(given.teacher, given.recipe, given.budget, given.work / key, steps, max(given.steps), seed)] = rows
    if missing:
        make(missing, kept, path, given.workers)
    kept["runs"].sort(key=lambda r: (ROWS.index(r["row"]), r["steps"], r["seed"]))
    keep(published, kept)
    draw(kept, given.page.with_suffix(".png"))
    given.page.write_text(page(kept, given.page.with_suffix(".png").name) + "\n")


if __name__ == "__main__":
    main()
