"""The ablation table: one base student a seed, and ways to spend the same number of forwards on it.

    python -m benchmarks.ablation artifacts/ablation --page docs/ablation.md      # `make ablation`

Each run is kept at once and not made again, so the same command resumes; the page and its JSON are written when all are there. The unit
of cost is F, one transformer forward of one sample; a backward is 2 F. One update of each row is measured by hooks.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from benchmarks.ablation_page import draw, page
from benchmarks.scores import Meter, Ruler, gradient_variance, keep
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import open_artifact
from flashgen.flow.grid import shifted_grid
from flashgen.models.sample import latent_shape, load_pipeline
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.recipe.schema import MatchingTraining
from flashgen.stages.distill import cached, guided
from flashgen.stages.finetune import merge
from flashgen.stages.report import verdicts
from flashgen.training.loop import save_state
from flashgen.training.matching import Matcher, train_matching
from flashgen.training.prompts import PromptPool, prompt_pool
from flashgen.training.trajectories import train_on_trajectories

# What each row changes in `distill.matching` of the recipe. Rows that are not here are made by hand below.
MATCHING: dict[str, dict[str, Any]] = {
    "re-noise (DMD2)": {"point": "renoise", "proxy_target": "step"},
    "re-noise + adversarial": {"point": "renoise", "proxy_target": "step", "node_adversarial": [1.0]},
    "re-noise, proxy on rollouts": {"point": "renoise"},
    "shared": {},
    "shared, last step interpolated": {"last": "interp"},
    "shared + adversarial": {"node_adversarial": [1.0]},
    "shared, proxy on steps": {"proxy_target": "step"},
    "interval": {"point": "interval", "proxy_target": "interval"},
    "shared + decoupled": {"augmentation": "decoupled"},
    "shared + trajectory on node 0": {"node_trajectory": [1.0, *([0.0] * 7)]},
}
PER_TASK, FEW = 40, 6  # prompts a task: of verdicts, and of the sets that distances are of
BUDGET = 600.0  # F a sample
EXPERTS = ("split + merge", "two experts")
HALVES = ("control", *EXPERTS)  # half the budget on `shared`, the other half on this
ROWS = ("trajectory", *MATCHING, *HALVES)


class Experts(nn.Module):
    """Two branches unmerged: the network of a batch is chosen by its noise level."""

    def __init__(self, high: nn.Module, low: nn.Module, split: float) -> None:
        super().__init__()
        self.high, self.low, self.split, self.config = high, low, split, high.config

    def forward(self, x: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor, **options: Any) -> Any:
        return (self.high if timestep[0] > 1000 * self.split else self.low)(x, embeds, pooled, timestep, **options)


@dataclass(frozen=True)
class Task:
    """What the runs of one seed and one number of steps share, as plain values that reach a worker."""

    teacher: str
    recipe: str
    budget: float
    work: Path
    steps: int
    finest: int  # steps of the finest student: its nodes hold those of the others, so one cache of trajectories serves them all
    seed: int


class Bench:
    """A `Task` with its networks loaded."""

    def __init__(self, task: Task) -> None:
        source, recipe = open_artifact(task.teacher, ("teacher",)), load(task.recipe)
        taught = source.manifest.sampler
        assert taught is not None
        self.taught, self.recipe, self.steps, self.seed, self.budget = taught, recipe, task.steps, task.seed, task.budget
        self.nodes = shifted_grid(self.steps, taught.shift)
        self.pipe: StableDiffusion3Pipeline = load_pipeline(source.path)
        self.teacher: nn.Module = self.pipe.transformer
        self.shape = latent_shape(self.pipe, taught.size_px)
        self.sampler = Sampler(**{**taught.model_dump(), "sigmas": self.nodes, "guidance": 1.0, "trained_steps": [self.steps]})
        self.ruler = Ruler(self.pipe, taught, task.work, PER_TASK, FEW)
        self.work = task.work / f"steps{self.steps}-seed{self.seed}"
        self.pool: PromptPool = prompt_pool(self.pipe, recipe.distill.matching.prompts, self.seed + 1, taught.t5_tokens)
        finest = shifted_grid(task.finest, taught.shift)
        leader = guided(self.teacher, taught.shift, recipe)
        replay = cached(self.pipe, leader, finest, taught, recipe, self.seed, task.work / f"seed{self.seed}-{task.finest}")
        self.replay = replay.on([finest.index(node) for node in self.nodes])

    @property
    def base(self) -> nn.Module:
        return self._kept("base", self._train_base)

    def half(self) -> tuple[nn.Module, nn.Module]:
        """(student, proxy) after `shared` for half of the budget."""
        matcher, _ = self.match("half", self.base, self.recipe.distill.matching, self.budget / 2)  # made once, then read
        return matcher.student, matcher.proxy

    def _kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A network that several rows begin from, saved in the work folder."""
        path, network = self.work / f"{name}.weights.pt", copy.deepcopy(self.teacher)
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
            return network
        made = make()
        save_state(made.state_dict(), path)
        return made

    def _train_base(self) -> nn.Module:
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        train_on_trajectories(student, self.replay, self.nodes, self.recipe.distill.trajectory, self.seed, self.work / "base")
        return student

    def prepare(self, rows: list[str]) -> None:
        """The networks that several of `rows` begin from or judge."""
        assert self.base
        if set(rows) & set(HALVES):
            self.half()
        if set(rows) & set(EXPERTS):
            self.experts()

    def matcher(self, name: str, student: nn.Module, config: MatchingTraining, turn: int = 0, **options: Any) -> Matcher:
        weights = config.node_trajectory
        trimmed = config.model_copy(update={"node_trajectory": weights if len(weights) == 1 else weights[: self.steps]})
        return Matcher(
            name, student.requires_grad_(True), self.teacher, self.pool, self.nodes, trimmed, self.shape, self.seed + 100 * turn,
            t5_drop=self.recipe.distill.t5_drop, replay=self.replay, **options,
        )  # fmt: skip

    def cost(self, config: MatchingTraining) -> float:
        """F a sample of one student update, measured."""
        matcher = self.matcher("cost", copy.deepcopy(self.teacher), config.model_copy(update={"batch": 2, "proxy_warmup": 0}))
        with Meter().on(matcher.student, matcher.proxy, self.teacher) as meter:
            matcher.update(0)
        return meter.forwards / 2

    def match(
        self, name: str, start: nn.Module, config: MatchingTraining, budget: float, turn: int = 0, **options: Any
    ) -> tuple[Matcher, float]:
        """Spend `budget` F a sample on `config`, the proxy's warm-up included; (matcher, what was spent)."""
        per_update, warm = self.cost(config), config.proxy_warmup * (self.steps + 3 * config.proxy_updates)
        iterations = round((budget - warm) / per_update)
        if iterations < 1:
            raise SystemExit(f"a budget of {budget:g} F buys no update of {name}; raise --budget")
        matcher = self.matcher(name, start, config.model_copy(update={"iterations": iterations}), turn, **options)
        train_matching(matcher, self.work / name)
        return matcher, warm + iterations * per_update

    def run(self, row: str) -> dict[str, Any]:
        name = row.replace(" ", "-")
        config = self.recipe.distill.matching.model_copy(update=MATCHING.get(row, {}))
        found: dict[str, Any] = {"row": row, "steps": self.steps, "seed": self.seed}
        if row == "trajectory":
            changes = {"iterations": round(self.budget / 3), "batch": config.batch}  # F is of a sample: batches must be of one size
            longer = self.recipe.distill.trajectory.model_copy(update=changes)
            student = self.base.requires_grad_(True)
            train_on_trajectories(student, self.replay, self.nodes, longer, self.seed + 100, self.work / name)
            found["forwards"] = 3.0 * longer.iterations
        elif row in MATCHING:
            matcher, found["forwards"] = self.match(name, self.base, config, self.budget)
            student, found["per_update"] = matcher.student, self.cost(config)
            if not matcher.heads:
                found |= gradient_variance(matcher)
        else:
            student, found["forwards"] = self._second_half(row, name)
        return found | self.ruler.score(student.requires_grad_(False), self.sampler)

    def experts(self) -> tuple[nn.Module, nn.Module, float]:
        """(high, low, what both cost): the half-way student trained on by noise level, rollouts through both, a proxy each."""
        split, (half, proxy) = self.recipe.finetune.split, self.half()
        high, low, spent = copy.deepcopy(half), copy.deepcopy(half), 0.0
        sides = (("high", high, [i for i, s in enumerate(self.nodes[:-1]) if s > split]),
                 ("low", low, [i for i, s in enumerate(self.nodes[:-1]) if s <= split]))  # fmt: skip
        for turn, (side, branch, own) in enumerate(sides, 2):
            options = {"train_nodes": own, "net_at": lambda sigma: high if sigma > split else low, "proxy": copy.deepcopy(proxy)}
            spent += self.match(f"experts-{side}", branch, self._warm(), self.budget / 4, turn, **options)[1]
        return high, low, spent

    def _warm(self) -> MatchingTraining:
        """The second half goes on with the proxy of the first."""
        return self.recipe.distill.matching.model_copy(update={"proxy_warmup": 0})

    def _second_half(self, row: str, name: str) -> tuple[nn.Module, float]:
        if row == "control":
            half, proxy = self.half()
            matcher, spent = self.match(name, half, self._warm(), self.budget / 2, 1, proxy=proxy)
            return matcher.student, self.budget / 2 + spent
        high, low, spent = self.experts()
        if row == "two experts":
            return Experts(high, low, self.recipe.finetune.split), self.budget / 2 + spent
        merged, scores = copy.deepcopy(high), {}
        for ratio in self.recipe.finetune.merge_high:
            merge(merged, high, low, ratio)
            own_net, self.pipe.transformer = self.pipe.transformer, merged
            scores[ratio] = verdicts(self.pipe, self.sampler, self.recipe.bench).mean()
            self.pipe.transformer = own_net
        merge(merged, high, low, max(scores, key=lambda ratio: scores[ratio]))
        return merged, self.budget / 2 + spent


bench_of = lru_cache(maxsize=2)(Bench)


def start_worker() -> None:
    """One thread: two such processes do more on two cores than one of two threads (docs/lab-log.md). Ends with its parent."""
    torch.set_num_threads(1)

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def prepare(task: Task, rows: list[str]) -> None:
    bench_of(task).prepare(rows)


def run(task: Task, row: str) -> dict[str, Any]:
    start = time.monotonic()
    found = bench_of(task).run(row)
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def score_teacher(task: Task) -> dict[str, Any]:
    bench = bench_of(task)
    return bench.ruler.score(bench.teacher, bench.taught)


def cache(task: Task) -> None:
    """The trajectories of the task's seed."""
    bench_of(task)


def make(missing: dict[Task, list[str]], kept: dict[str, Any], path: Path, workers: int) -> None:
    """Run what is missing, task by task, and keep each run in `path` at once."""
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        seeds = list({task.seed: task for task in missing}.values())
        list(pool.map(cache, seeds))
        if not kept["teacher"]:
            kept["teacher"] = pool.submit(score_teacher, seeds[0]).result()
        tasks = list(missing)
        ready = pool.submit(prepare, tasks[0], missing[tasks[0]])
        for task, after in itertools.zip_longest(tasks, tasks[1:]):
            ready.result()
            if after:  # one process prepares the next task while others work on this one's rows
                ready = pool.submit(prepare, after, missing[after])
            for future in as_completed([pool.submit(run, task, row) for row in missing[task]]):
                found = future.result()
                kept["runs"].append(found)
                keep(path, kept)
                say(f"{found['steps']} steps, seed {found['seed']}, {found['row']}: composition {np.mean(found['passed']):.3f}, "
                    f"FD true {found['fd_true']:.2f}, {found['seconds']:.0f} s")  # fmt: skip


def kept_runs(key: str, *paths: Path) -> dict[str, Any]:
    """Of `paths` the one with most runs of this recipe, budget and teacher; none of others, which stay where they are."""
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    empty: dict[str, Any] = {"key": key, "teacher": None, "runs": []}
    return max([empty, *(kept for kept in found if kept["key"] == key)], key=lambda kept: len(kept["runs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for runs, weights and caches")
    parser.add_argument("--page", type=Path, required=True, help="Markdown; its numbers beside it as .json, the plot as .png")
    parser.add_argument("--teacher", default="shapes")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=BUDGET, help="F a sample that each row may spend")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    given = parser.parse_args()
    source, recipe = open_artifact(given.teacher, ("teacher",)), load(given.recipe)
    taught = source.manifest.sampler
    assert taught is not None
    if recipe.distill.strides or recipe.distill.compile or recipe.distill.start:
        raise SystemExit(
            f"{given.recipe} has distill.strides, compile or start, which the rows, on even grids and in small processes, would not heed"
        )
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
            f"{published} holds runs of another recipe, budget or teacher, which a part of the table cannot stand for; name another --page"
        )
    made = {(r["steps"], r["seed"], r["row"]) for r in kept["runs"]}
    missing: dict[Task, list[str]] = {}
    for steps, seed in itertools.product(given.steps, given.seeds):
        one_branch = shifted_grid(steps, taught.shift)[-2] > recipe.finetune.split
        rows = [row for row in given.rows if (steps, seed, row) not in made and not (one_branch and row in EXPERTS)]
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
