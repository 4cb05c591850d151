"""The ablation table: one base student a seed, and ways to spend the same number of forwards on it.

    python -m benchmarks.ablation artifacts/ablation --page docs/ablation.md      # `make ablation`

Each run is kept in the page's JSON at once and not made again, so the same command resumes. The unit of cost is F, one transformer
forward of one sample; a backward is 2 F. One update of each row is measured by hooks.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.scores import Meter, Ruler, interval
from flashgen.artifact.manifest import Sampler
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.flow.convert import x0_from_v
from flashgen.flow.grid import few_step_grid
from flashgen.models.sample import load_pipeline
from flashgen.objectives.evaluation import evaluation_point, evaluation_sigma
from flashgen.progress import say
from flashgen.recipe.load import load
from flashgen.recipe.schema import MatchingTraining, Recipe
from flashgen.shapes.scene import TASKS
from flashgen.stages.distill import cached
from flashgen.stages.finetune import merge
from flashgen.stages.report import verdicts
from flashgen.training.loop import save_state
from flashgen.training.matching import Matcher, roll_out, train_matching
from flashgen.training.prompts import PromptPool, prompt_pool
from flashgen.training.ranks import Draws
from flashgen.training.trajectories import Replay, train_on_trajectories, velocity

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
PER_TASK, FEW = 50, 10  # prompts a task: of verdicts, and of the sets that distances are of
BUDGET = 600.0  # F a sample
ABOUT = """
Each row starts from the same base student of its seed (trajectory guidance alone, `recipes/ablation.yaml`), spends the same number of
forwards on it with the same hyper-parameters, and is judged on 300 prompts, and on 60 more drawn 8 times each, that no stage draws from.
`control`, `split + merge` and `two experts` spend the first half on `shared`. A row is an edit of `distill.matching`: see `MATCHING`
in `benchmarks/ablation.py`.

F is one transformer forward of one sample; a backward counts 2. Distances, recall and diversity (mean distance between pictures of one
prompt) are in VAE-PCA64 ([what that is](../flashgen/metrics/distribution.py)). Variance is that of the direction at x0 of one prompt over
8 redraws, over its mean square; "given z" with the start noise held. Intervals are 95 %, bootstrapped over seeds and prompts; seconds are
wall time on 2 cores, training and scoring, and noisy."""
HALVES = ("control", "split + merge", "two experts")  # half the budget on `shared`, the other half on this
ROWS = ("trajectory", *MATCHING, *HALVES)


class Experts(nn.Module):
    """Two branches unmerged: the network of a batch is chosen by its noise level."""

    def __init__(self, high: nn.Module, low: nn.Module, split: float) -> None:
        super().__init__()
        self.high, self.low, self.split, self.config = high, low, split, high.config

    def forward(self, x: Tensor, embeds: Tensor, pooled: Tensor, timestep: Tensor, **options: Any) -> Any:
        return (self.high if timestep[0] > 1000 * self.split else self.low)(x, embeds, pooled, timestep, **options)


class Bench:
    """Everything that the runs of one seed and one number of steps share."""

    def __init__(self, source: Artifact, recipe: Recipe, steps: int, seed: int, budget: float, work: Path) -> None:
        taught = source.manifest.sampler
        assert taught is not None
        self.taught, self.recipe, self.steps, self.seed, self.budget = taught, recipe, steps, seed, budget
        self.nodes = few_step_grid(steps, taught.shift)
        self.pipe: StableDiffusion3Pipeline = load_pipeline(source.path)
        self.teacher: nn.Module = self.pipe.transformer
        self.shape = (self.pipe.transformer.config.in_channels, taught.size_px // 8, taught.size_px // 8)
        self.sampler = Sampler(**{**taught.model_dump(), "sigmas": self.nodes, "guidance": 1.0, "trained_steps": [steps]})
        self.ruler = Ruler(self.pipe, taught, work, PER_TASK, FEW)
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
        name = row.replace(" ", "-")
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
        return found | self.ruler.score(student.requires_grad_(False), self.sampler)

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


def table(runs: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Verdicts [runs, prompts]."""
    return np.array([r["passed"] for r in runs], float)


# Column heads of the second table, and where each number is in a run.
COLUMNS = {
    "FD to teacher": "fd_teacher", "FD to true": "fd_true", "recall of teacher": "recall_teacher", "recall of true": "recall_true",
    "diversity": "diversity", "variance": "variance", "variance given z": "variance_given_z", "F an update": "per_update",
    "F": "forwards", "seconds": "seconds",
}  # fmt: skip
PAIRS = (
    ("shared", "re-noise (DMD2)"), ("shared", "re-noise, proxy on rollouts"), ("shared", "shared, proxy on steps"),
    ("shared", "interval"), ("shared", "trajectory"), ("shared + adversarial", "shared"), ("split + merge", "control"),
    ("two experts", "control"),
)  # fmt: skip


def page(kept: dict[str, Any], plot: str) -> str:
    """The whole report in Markdown."""
    teacher, runs = kept["teacher"], kept["runs"]
    lines = ["# Ablation", "", f"`make ablation` writes this page, [its raw numbers](ablation.json) and the plot. {ABOUT}", ""]
    distances = f"FD to true scenes {teacher['fd_true']:.2f}, recall of true scenes {teacher['recall_true']:.2f}"
    lines += [f"The teacher, 28 steps, guided: composition {np.mean(teacher['passed']):.3f}, {distances}, "
              f"diversity {teacher['diversity']:.2f}.", "", f"![composition]({plot})", ""]  # fmt: skip
    for steps in sorted({r["steps"] for r in runs}, key=lambda s: (s != 4, s)):
        mine = [r for r in runs if r["steps"] == steps]
        rows = {row: [r for r in mine if r["row"] == row] for row in ROWS}
        seeds = sorted({r["seed"] for r in mine})
        lines += [f"## {steps} steps, seeds {', '.join(map(str, seeds))}", "", *_table(["row", "composition", *TASKS])]
        for row, own in rows.items():
            if own:
                value, low, high = interval(table(own))
                tasks = table(own).reshape(len(own), len(TASKS), -1).mean((0, 2))
                lines.append(_cells(row, f"{value:.3f} [{low:.3f}, {high:.3f}]", *(f"{t:.2f}" for t in tasks)))
        lines += ["", *_table(["row", *COLUMNS])]
        lines += [_cells(row, *(_mean(own, key) for key in COLUMNS.values())) for row, own in rows.items() if own]
        lines += ["", *_differences(rows), ""]
    return "\n".join(lines)


def _table(heads: list[str]) -> list[str]:
    return [_cells(*heads), "|---" * len(heads) + "|"]


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(own: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in own if r.get(key) is not None]
    return f"{np.mean(values):.{0 if np.mean(values) >= 100 else 2}f}" if values else ""


def _differences(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Differences in composition, same seed, same prompts, same noise."""
    lines = []
    for a, b in PAIRS:
        ours, theirs = ({r["seed"]: r for r in rows[row]} for row in (a, b))
        both = sorted(ours.keys() & theirs.keys())
        if both:
            value, low, high = interval(table([ours[s] for s in both]) - table([theirs[s] for s in both]))
            lines.append(f"* {a} minus {b}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def draw(kept: dict[str, Any], path: Path) -> None:
    """Composition by row with its interval, one panel a number of steps."""
    from matplotlib.figure import Figure

    every = sorted({r["steps"] for r in kept["runs"]})
    figure = Figure(figsize=(3 + 3 * len(every), 0.34 * len(ROWS) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for panel, steps in zip(panels, every, strict=True):
        for place, row in enumerate(ROWS):
            own = [r for r in kept["runs"] if r["row"] == row and r["steps"] == steps]
            if own:
                value, low, high = interval(table(own))
                color = "C0" if "shared" in row else "C7"
                panel.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
        panel.axvline(np.mean(kept["teacher"]["passed"]), color="k", lw=0.8, ls=":")
        panel.set_title(f"{steps} steps")
        panel.set_xlabel("composition, 95 %")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(ROWS)), ROWS)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def keep(path: Path, kept: dict[str, Any]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for weights and caches, which may be removed at any time")
    parser.add_argument("--page", type=Path, required=True, help="Markdown; runs are kept beside it as .json, the plot as .png")
    parser.add_argument("--teacher", default="shapes")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=BUDGET, help="F a sample that each row may spend")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    given = parser.parse_args()
    recipe = load(given.recipe)
    source = open_artifact(given.teacher, ("teacher",))
    assert source.manifest.sampler is not None
    identity = json.dumps([source.manifest.digest, recipe.distill.model_dump(), recipe.finetune.model_dump(), given.budget, PER_TASK, FEW])
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = given.page.with_suffix(".json")
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"key": key, "teacher": None, "runs": []}
    if kept["key"] != key:
        raise SystemExit(f"{path} holds runs of another recipe, budget or teacher; remove it or name another --page")
    made = {(r["steps"], r["seed"], r["row"]) for r in kept["runs"]}
    for seed, steps in itertools.product(given.seeds, given.steps):
        one_branch = few_step_grid(steps, source.manifest.sampler.shift)[-2] > recipe.finetune.split
        missing = [row for row in given.rows if (steps, seed, row) not in made and not (one_branch and row in HALVES[1:])]
        if not missing:
            continue
        bench = Bench(source, recipe, steps, seed, given.budget, given.work / key)
        kept["teacher"] = kept["teacher"] or bench.ruler.score(bench.teacher, bench.taught)
        for row in missing:
            start = time.monotonic()
            found = bench.run(row)
            kept["runs"].append({**found, "seconds": round(time.monotonic() - start, 1)})
            keep(path, kept)
            say(f"{steps} steps, seed {seed}, {row}: composition {np.mean(found['passed']):.3f}, FD true {found['fd_true']:.2f}")
    draw(kept, given.page.with_suffix(".png"))
    given.page.write_text(page(kept, given.page.with_suffix(".png").name) + "\n")


if __name__ == "__main__":
    main()
