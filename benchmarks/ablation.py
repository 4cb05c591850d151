"""The ablation table: one base student a seed, and ways to spend the same number of forwards on it.

    python benchmarks/ablation.py artifacts/ablation --page docs/ablation.md      # `make ablation`

Every run is one JSON file under `OUT/<key>/runs`, where the key is the teacher's digest, the recipe and the budget; a run that is
there is not made again, so the same command resumes. The unit of cost is F, one transformer forward of one sample; a backward
is 2 F. One update of each row is measured by hooks.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import open_artifact
from flashgen.flow.convert import x0_from_v
from flashgen.flow.grid import few_step_grid
from flashgen.metrics.distribution import Features, Space, diversity, frechet_distance, pooled_latents, recall
from flashgen.models.sample import load_pipeline, sample
from flashgen.objectives.evaluation import evaluation_point, evaluation_sigma
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.recipe.schema import MatchingTraining, Recipe
from flashgen.shapes.render import render
from flashgen.shapes.scene import TASKS, Request, prompt_set, realise
from flashgen.shapes.verify import judge
from flashgen.stages.distill import cached
from flashgen.stages.finetune import merge
from flashgen.stages.report import verdicts
from flashgen.training.loop import save_state
from flashgen.training.matching import Matcher, roll_out, train_matching
from flashgen.training.prompts import PromptPool, prompt_pool
from flashgen.training.ranks import Draws
from flashgen.training.trajectories import Replay, train_on_trajectories, velocity

TEST_SEED = 4000  # a stream of prompts and noise that no stage draws from; single captions do occur in training, the world is small
# What each row changes in `distill.matching` of the recipe. Rows that are not here are made by hand below.
MATCHING: dict[str, dict[str, Any]] = {
    "re-noise (DMD2)": {"point": "renoise", "proxy_target": "step"},
    "re-noise + adversarial": {"point": "renoise", "proxy_target": "step", "node_adversarial": [1.0]},
    "re-noise, proxy on rollouts": {"point": "renoise"},
    "shared": {},
    "shared + adversarial": {"node_adversarial": [1.0]},
    "shared, proxy on steps": {"proxy_target": "step"},
    "interval": {"point": "interval", "proxy_target": "interval"},
    "shared + decoupled": {"augmentation": "decoupled"},
    "shared + trajectory on node 0": {"node_trajectory": [1.0, *([0.0] * 7)]},
}
HALVES = ("control", "split + merge", "two experts")  # half the budget on `shared`, the other half on this
ROWS = ("trajectory", *MATCHING, *HALVES)


class Meter:
    """Counts F of the networks it is hung on."""

    def __init__(self) -> None:
        self.forwards = 0.0

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """On the first block of a transformer: the last that a backward reaches, also from features in the middle."""
        rows = len(output[1])
        self.forwards += rows
        if output[1].requires_grad:
            output[1].register_hook(lambda _: self._add(2 * rows))

    def _add(self, rows: float) -> None:
        self.forwards += rows

    @contextmanager
    def on(self, *networks: nn.Module) -> Iterator[Meter]:
        blocks: list[Any] = [network.transformer_blocks for network in {id(n): n for n in networks}.values()]
        handles = [first.register_forward_hook(self._hook) for first, *_ in blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


class Experts(nn.Module):
    """Two branches unmerged: the network of a batch is chosen by its noise level."""

    def __init__(self, high: nn.Module, low: nn.Module, split: float) -> None:
        super().__init__()
        self.high, self.low, self.split, self.config = high, low, split, high.config

    def forward(self, x: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor, **options: Any) -> Any:
        return (self.high if timestep[0] > 1000 * self.split else self.low)(x, embeds, pooled, timestep, **options)


class Bench:
    """Everything that the runs of one seed and one number of steps share."""

    def __init__(self, teacher: str, recipe: Recipe, steps: int, seed: int, budget: float, work: Path) -> None:
        self.source = open_artifact(teacher)
        taught = self.source.manifest.sampler
        assert taught is not None
        self.taught, self.recipe, self.steps, self.seed, self.budget = taught, recipe, steps, seed, budget
        self.nodes = few_step_grid(steps, taught.shift)
        self.pipe: StableDiffusion3Pipeline = load_pipeline(self.source.path)
        self.teacher: nn.Module = self.pipe.transformer
        self.shape = (self.pipe.transformer.config.in_channels, taught.size_px // 8, taught.size_px // 8)
        self.sampler = Sampler(**{**taught.model_dump(), "sigmas": self.nodes, "guidance": 1.0, "trained_steps": [steps]})
        self.work = work / f"steps{steps}-seed{seed}"
        self.pool: PromptPool = prompt_pool(self.pipe, recipe.distill.matching.prompts, seed + 1, taught.t5_tokens)
        self.replay: Replay = cached(self.pipe, self.teacher, self.nodes, taught, recipe, seed, self.work)
        self.base = self._kept("base", self._train_base)

    def _kept(self, name: str, make: Any) -> nn.Module:
        """A network that several rows begin from, saved in the work folder."""
        path, network = self.work / f"{name}.weights.pt", copy.deepcopy(self.teacher)
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
            return network
        made: nn.Module = make()
        save_state(made.state_dict(), path)
        return made

    def _train_base(self) -> nn.Module:
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        train_on_trajectories(student, self.replay, self.nodes, self.recipe.distill.trajectory, self.seed, self.work / "base")
        return student

    def matcher(self, name: str, student: nn.Module, config: MatchingTraining, turn: int = 0, **options: Any) -> Matcher:
        weights = config.node_trajectory
        trimmed = config.model_copy(update={"node_trajectory": weights if len(weights) == 1 else weights[: self.steps]})
        return Matcher(
            name, student.requires_grad_(True), self.teacher, self.pool, self.nodes, trimmed, self.shape, self.seed + 100 * turn,
            t5_drop=self.recipe.distill.t5_drop, replay=self.replay, **options,
        )  # fmt: skip

    def cost(self, config: MatchingTraining) -> float:
        """F a sample of one student update, measured."""
        matcher = self.matcher("cost", copy.deepcopy(self.base), config.model_copy(update={"batch": 2, "proxy_warmup": 0}))
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
        name = slug(row)
        config = self.recipe.distill.matching.model_copy(update=MATCHING.get(row, {}))
        found: dict[str, Any] = {"row": row, "steps": self.steps, "seed": self.seed}
        if row == "trajectory":
            longer = self.recipe.distill.trajectory.model_copy(update={"iterations": round(self.budget / 3)})
            student = copy.deepcopy(self.base).requires_grad_(True)
            train_on_trajectories(student, self.replay, self.nodes, longer, self.seed + 100, self.work / name)
            found["forwards"] = 3.0 * longer.iterations
        elif row in MATCHING:
            matcher, found["forwards"] = self.match(name, copy.deepcopy(self.base), config, self.budget)
            student, found["per_update"] = matcher.student, self.cost(config)
            if not matcher.heads:
                found |= gradient_variance(matcher)
        else:
            student, found["forwards"] = self._second_half(row, name)
        return found | self.score(student.requires_grad_(False))

    def _second_half(self, row: str, name: str) -> tuple[nn.Module, float]:
        half = self._kept(
            "half", lambda: self.match("half", copy.deepcopy(self.base), self.recipe.distill.matching, self.budget / 2)[0].student
        )
        config, split = self.recipe.finetune.matching, self.recipe.finetune.split
        if row == "control":
            matcher, spent = self.match(name, copy.deepcopy(half), config, self.budget / 2, 1)
            return matcher.student, self.budget / 2 + spent
        high, low, spent = copy.deepcopy(half), copy.deepcopy(half), 0.0
        sides = (("high", high, [i for i, s in enumerate(self.nodes[:-1]) if s > split]),
                 ("low", low, [i for i, s in enumerate(self.nodes[:-1]) if s <= split]))  # fmt: skip
        for turn, (side, branch, own) in enumerate(sides, 2):
            options = {"train_nodes": own, "net_at": lambda sigma: high if sigma > split else low}
            spent += self.match(f"experts-{side}", branch, config, self.budget / 4, turn, **options)[1]
        if row == "two experts":
            return Experts(high, low, split), self.budget / 2 + spent
        merged, scores = copy.deepcopy(half), {}
        for ratio in self.recipe.finetune.merge_high:
            merge(merged, high, low, ratio)
            own_net, self.pipe.transformer = self.pipe.transformer, merged
            scores[ratio] = verdicts(self.pipe, self.sampler, self.recipe.bench).mean()
            self.pipe.transformer = own_net
        merge(merged, high, low, max(scores, key=lambda ratio: scores[ratio]))
        return merged, self.budget / 2 + spent

    def score(self, network: nn.Module, sampler: Sampler | None = None) -> dict[str, Any]:
        """Verdicts prompt by prompt, and distances of 480 pictures: 60 prompts, 8 seeds each."""
        own, self.pipe.transformer = self.pipe.transformer, network
        try:
            requests = prompt_set(TEST_SEED, PER_TASK)
            images = self._draw(requests, range(len(requests)), sampler)
            passed = [judge(image, request).passed for image, request in zip(images, requests, strict=True)]
            few = [request for request in prompt_set(TEST_SEED + 1, 10) for _ in range(8)]
            features = pooled_latents(self.pipe.vae, self._draw(few, range(10_000, 10_000 + len(few)), sampler))
        finally:
            self.pipe.transformer = own
        return {"passed": [int(p) for p in passed], **self.distances(features)}

    def _draw(self, requests: list[Request], seeds: range, sampler: Sampler | None) -> NDArray[np.uint8]:
        return sample(self.pipe, sampler or self.sampler, [r.caption() for r in requests], list(seeds), batch=60)

    def distances(self, features: Features) -> dict[str, float]:
        teacher, true = self.references()
        space = Space.of(true)
        mine, taught, real = space(features), space(teacher), space(true)
        return {
            "fd_teacher": frechet_distance(taught, mine), "fd_true": frechet_distance(real, mine), "recall_teacher": recall(taught, mine),
            "recall_true": recall(real, mine), "diversity": diversity(mine.reshape(-1, 8, mine.shape[-1])),
        }  # fmt: skip

    def references(self) -> tuple[Features, Features]:
        """Features of the teacher's pictures and of true scenes for the same prompts, other noise; computed once."""
        path = self.work.parent / "references.npz"
        if not path.exists():
            few = [request for request in prompt_set(TEST_SEED + 1, 10) for _ in range(8)]
            rng = np.random.default_rng(TEST_SEED)
            own, self.pipe.transformer = self.pipe.transformer, self.teacher
            taught = self._draw(few, range(20_000, 20_000 + len(few)), self.taught)
            self.pipe.transformer = own
            true = np.stack([render(realise(request, rng)) for request in few])
            np.savez(path.with_suffix(".tmp.npz"), teacher=pooled_latents(self.pipe.vae, taught), true=pooled_latents(self.pipe.vae, true))
            os.replace(path.with_suffix(".tmp.npz"), path)
        with np.load(path) as saved:
            return saved["teacher"], saved["true"]


@torch.no_grad()
def gradient_variance(matcher: Matcher, prompts: int = 16, redraws: int = 8) -> dict[str, float]:
    """Mean variance an element of the direction at x0 over redraws, prompt by prompt, averaged over all nodes but the last.

    `variance` redraws the start noise and everything after it; `variance_given_z` only what is random once the start noise is
    fixed (nothing, for `shared` with tied augmentation; its last node has no next level to share, so it is left out for all).
    Both over the mean square of the direction, so that scales cancel.
    """
    config, found = matcher.config, {}
    said = matcher.pool.cond[torch.arange(prompts).repeat_interleave(redraws)]
    count = prompts * redraws
    for name, fixed in (("variance", False), ("variance_given_z", True)):
        g, parts = Draws(count, matcher.seed, 99), []
        noise = g.randn(*matcher.shape)
        if fixed:
            noise = noise[::redraws].repeat_interleave(redraws, 0)
        rollout = roll_out(matcher.net_at, noise, said, matcher.nodes)
        for index in range(len(matcher.nodes) - 2):
            node = torch.full((count,), index)
            sigma, sigma_next, x = matcher.sigmas[node], matcher.sigmas[node + 1], rollout.states[index]
            v = velocity(matcher.student, x, sigma, said)
            sigma_eval = evaluation_sigma(config.point, sigma, sigma_next, g.rand())
            x_eval = evaluation_point(config.point, x, v, sigma, sigma_next, sigma_eval, g.randn(*matcher.shape))
            direction, _ = matcher.direction(x0_from_v(x, v, sigma), x_eval, sigma, sigma_eval, node, said, g)
            drawn = direction.reshape(prompts, redraws, -1)
            parts.append((drawn.var(1).mean() / drawn.square().mean()).item())
        found[name] = float(np.mean(parts))
    return found


PER_TASK = 50


def slug(row: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")


def interval(runs: list[dict[str, Any]], other: list[dict[str, Any]] | None = None) -> tuple[float, float, float]:
    """Mean composition (minus that of `other`, pair by pair) and its 95 % bootstrap interval over seeds and prompts."""
    table = np.array([r["passed"] for r in runs], float)
    if other is not None:
        table = table - np.array([r["passed"] for r in other], float)
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        seeds = rng.integers(len(table), size=len(table))
        means.append(table[np.ix_(seeds, rng.integers(table.shape[1], size=table.shape[1]))].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def page(runs: list[dict[str, Any]], teacher: dict[str, Any], command: str) -> str:
    """The whole report in Markdown."""
    lines = ["# Ablation", "", f"`{command}`", "", __doc__.split("\n\n")[0] if __doc__ else "", ""]
    lines += [f"The teacher, 28 steps, guided: composition {np.mean(teacher['passed']):.3f}, FD to true scenes {teacher['fd_true']:.2f}, "
              f"diversity {teacher['diversity']:.2f}.", ""]  # fmt: skip
    for steps in sorted({r["steps"] for r in runs}, key=lambda s: (s != 4, s)):
        mine = [r for r in runs if r["steps"] == steps]
        seeds = sorted({r["seed"] for r in mine})
        lines += [f"## {steps} steps, {len(seeds)} seeds", ""]
        lines += [
            "| row | composition | "
            + " | ".join(TASKS)
            + " | FD teacher | FD true | recall | diversity | variance | given z | F/update | F |"
        ]
        lines += ["|---" * (len(TASKS) + 10) + "|"]
        for row in ROWS:
            own = sorted((r for r in mine if r["row"] == row), key=lambda r: r["seed"])
            if own:
                lines.append(_line(row, own))
        lines += ["", *_differences(mine), ""]
    return "\n".join(lines)


def _line(row: str, own: list[dict[str, Any]]) -> str:
    def mean(key: str, digits: int = 2) -> str:
        values = [r[key] for r in own if r.get(key) is not None]
        return f"{np.mean(values):.{digits}f}" if values else ""

    value, low, high = interval(own)
    tasks = np.array([r["passed"] for r in own], float).reshape(len(own), len(TASKS), -1).mean((0, 2))
    cells = [row, f"{value:.3f} [{low:.3f}, {high:.3f}]", *(f"{t:.2f}" for t in tasks)]
    cells += [mean(key) for key in ("fd_teacher", "fd_true", "recall_true", "diversity", "variance", "variance_given_z")]
    cells += [mean("per_update", 1), mean("forwards", 0)]
    return "| " + " | ".join(cells) + " |"


def _differences(mine: list[dict[str, Any]]) -> list[str]:
    pairs = [
        ("shared", "re-noise (DMD2)"),
        ("shared", "re-noise, proxy on rollouts"),
        ("shared", "trajectory"),
        ("split + merge", "control"),
    ]
    lines = []
    for a, b in pairs:
        ours, theirs = ({r["seed"]: r for r in mine if r["row"] == row} for row in (a, b))
        both = sorted(ours.keys() & theirs.keys())
        if both:
            value, low, high = interval([ours[s] for s in both], [theirs[s] for s in both])
            lines.append(f"* {a} minus {b}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def keep(path: Path, found: dict[str, Any]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(found))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", default="shapes")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1600, help="F a sample that each row may spend")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    recipe = load(given.recipe)
    source = open_artifact(given.teacher, ("teacher",))
    assert source.manifest.sampler is not None
    lowest = {steps: few_step_grid(steps, source.manifest.sampler.shift)[-2] for steps in given.steps}
    identity = json.dumps([source.manifest.digest, recipe.model_dump(), given.budget, PER_TASK])
    out = given.out / hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for steps, seed in itertools.product(given.steps, range(given.seeds)):
        rows = [row for row in given.rows if not (row in HALVES[1:] and lowest[steps] > recipe.finetune.split)]
        missing = [row for row in rows if not (folder / f"{steps}-{seed}-{slug(row)}.json").exists()]
        if missing:
            bench = Bench(given.teacher, recipe, steps, seed, given.budget, out / "work")
            if not (out / "teacher.json").exists():
                keep(out / "teacher.json", bench.score(bench.teacher, bench.taught))
            for row in missing:
                found = bench.run(row)
                say(f"{steps} steps, seed {seed}, {row}: composition {np.mean(found['passed']):.3f}, FD true {found['fd_true']:.2f}")
                keep(folder / f"{steps}-{seed}-{slug(row)}.json", found)
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    report = page(runs, json.loads((out / "teacher.json").read_text()), "make ablation")
    if given.page:
        given.page.write_text(report + "\n")
        given.page.with_suffix(".json").write_text(json.dumps(runs) + "\n")
    print(report)


if __name__ == "__main__":
    main()
