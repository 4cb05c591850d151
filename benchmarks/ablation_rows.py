"""The rows of `benchmarks.ablation`: what each trains, and its scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.scores import Meter, Ruler, gradient_variance, replaced_transformer
from flashgen.artifact.manifest import Sampler
from flashgen.flow.grid import shifted_grid
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import latent_shape
from flashgen.recipe.distillation import MatchingTraining
from flashgen.recipe.load import load
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.finetune import merge
from flashgen.stages.report import judge
from flashgen.stages.trajectories import cached_steps, guided_teacher, stage_pool
from flashgen.training import matching
from flashgen.training.cache import Replay
from flashgen.training.checkpoint import load_state, save_state
from flashgen.training.matching import Matcher
from flashgen.training.prompts import prompt_pool
from flashgen.training.regression import regress

# What each row changes in `distill.matching` of the recipe. `Bench` trains the other rows in ways of its own.
MATCHING: dict[str, dict[str, Any]] = {
    "re-noise (DMD2)": {"point": "renoise", "fake_score_target": "step"},
    "re-noise + adversarial": {"point": "renoise", "fake_score_target": "step", "node_adversarial": [1.0]},
    "re-noise, fake score on rollouts": {"point": "renoise"},
    "shared": {},
    "shared, last step interpolated": {"last": "interp"},
    "shared + adversarial": {"node_adversarial": [1.0]},
    "shared, fake score on steps": {"fake_score_target": "step"},
    "interval": {"point": "interval", "fake_score_target": "interval"},
    "shared + decoupled": {"augmentation": "decoupled"},
    "shared + trajectory on node 0": {"node_trajectory": [1.0, *([0.0] * 7)]},
}
PER_TASK, FEW = 40, 6  # prompts per task: for verdicts, and for the sets of pictures that distances compare
BUDGET = 600.0  # F per sample
EXPERTS = ("split + merge", "two experts")
HALVES = ("control", *EXPERTS)  # half the budget goes to `shared`, the other half to this
ROWS = ("trajectory", *MATCHING, *HALVES)


class Experts(nn.Module):
    """Two branches that are not merged: the noise level of a batch chooses one."""

    def __init__(self, high: nn.Module, low: nn.Module, split: float) -> None:
        super().__init__()
        self.high, self.low, self.split, self.config = high, low, split, high.config

    def forward(self, timestep: Tensor, **inputs: Any) -> Any:
        """Output of the branch for the transformer's keyword arguments."""
        return (self.high if timestep[0] > 1000 * self.split else self.low)(timestep=timestep, **inputs)


@dataclass(frozen=True)
class Task:
    """Inputs shared by the runs of one seed and one number of steps, as plain values for a worker process."""

    teacher: str
    recipe: str
    budget: float
    work: Path
    steps: int
    finest: int  # steps of the finest student: its nodes include those of the others, so all share one cache of trajectories
    seed: int


class Bench:
    """A `Task` with its networks loaded."""

    def __init__(self, task: Task) -> None:
        self.stage = prepare(Distill, {"teacher": task.teacher}, load(task.recipe), task.seed)
        self.recipe, self.taught = self.stage.recipe, self.stage.sampler
        self.steps, self.seed, self.budget = task.steps, task.seed, task.budget
        taught = self.taught
        self.nodes = shifted_grid(self.steps, taught.shift)
        self.pipe = load_pipeline(self.stage.source.path)
        self.teacher: nn.Module = self.pipe.transformer
        self.shape = latent_shape(self.pipe, taught.size_px)
        self.sampler = Sampler(**{**taught.model_dump(), "sigmas": self.nodes, "guidance": 1.0, "trained_steps": [self.steps]})
        self.ruler = Ruler(self.pipe, taught, task.work, PER_TASK, FEW)
        self.work = task.work / f"steps{self.steps}-seed{self.seed}"
        distill, cache_folder = self.recipe.distill, task.work / f"seed{self.seed}-{task.finest}"
        self.pool = prompt_pool(self.stage.training_prompts(distill.matching.prompts, self.seed + 1), self.pipe, taught)
        pool = stage_pool(self.stage, distill.trajectory.prompts, self.seed, self.pipe, taught, cache_folder)
        finest, source = shifted_grid(task.finest, taught.shift), self.stage.source
        steps_of = guided_teacher(self.teacher, taught.shift, self.recipe)
        fine = cached_steps(self.stage, pool, steps_of, finest, self.shape, cache_folder, source)
        at = [finest.index(node) for node in self.nodes]
        self.replay = Replay(fine.starts[:, at[:-1]], fine.ends[:, [index - 1 for index in at[1:]]], fine.pool)

    @property
    def base(self) -> nn.Module:
        """The base student: trajectory guidance alone."""
        return self._kept("base", self._train_base)

    def half(self) -> tuple[nn.Module, nn.Module]:
        """(student, fake score) after `shared` for half of the budget."""
        matcher, _ = self.match("half", self.base, self.recipe.distill.matching, self.budget / 2)  # later calls read its checkpoint
        return matcher.student, matcher.fake_score

    def _kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A network from which several rows start, saved in the work folder."""
        path, network = self.work / f"{name}.weights.pt", copy.deepcopy(self.teacher)
        if (saved := load_state(path)) is not None:
            network.load_state_dict(saved)
            return network
        network = make()
        save_state(network.state_dict(), path)
        return network

    def _train_base(self) -> nn.Module:
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        config, checkpoint = self.recipe.distill.trajectory, self.recipe.checkpoint
        regress(student, self.replay, self.nodes, config, self.seed, self.work / "base", checkpoint)
        return student

    def prepare(self, rows: list[str]) -> None:
        """Train the networks that several of `rows` start from or score."""
        assert self.base
        if set(rows) & set(HALVES):
            self.half()
        if set(rows) & set(EXPERTS):
            self.experts()

    def matcher(
        self,
        name: str,
        student: nn.Module,
        config: MatchingTraining,
        turn: int = 0,
        fake_score: nn.Module | None = None,
        **options: Any,
    ) -> Matcher:
        """A matching training of `student`; `options` are further fields of its task."""
        weights = config.node_trajectory
        trimmed = config.model_copy(update={"node_trajectory": weights if len(weights) == 1 else weights[: self.steps]})
        drop, seed = self.recipe.distill.encoder_drop, self.seed + 100 * turn
        task = matching.Task(name, self.pool, self.nodes, self.shape, seed, drop, self.replay, shift=self.taught.shift, **options)
        return Matcher(task, matching.Roles(student.requires_grad_(True), self.teacher, fake_score), trimmed, self.stage.family)

    def cost(self, config: MatchingTraining) -> float:
        """Measured F per sample of one student update."""
        matcher = self.matcher("cost", copy.deepcopy(self.teacher), config.model_copy(update={"batch": 2, "fake_score_warmup": 0}))
        with Meter().on(matcher.student, matcher.fake_score, self.teacher) as meter:
            matcher.update(0)
        return meter.forwards / 2

    def match(
        self, name: str, start: nn.Module, config: MatchingTraining, budget: float, turn: int = 0, **options: Any
    ) -> tuple[Matcher, float]:
        """Spend `budget` F per sample on `config`, the fake score's warm-up included; (matcher, F spent)."""
        per_update, warm = self.cost(config), config.fake_score_warmup * (self.steps + 3 * config.fake_score_updates)
        iterations = round((budget - warm) / per_update)
        if iterations < 1:
            raise SystemExit(f"a budget of {budget:g} F buys no update of {name}; raise --budget")
        matcher = self.matcher(name, start, config.model_copy(update={"iterations": iterations}), turn, **options)
        matching.train_matching(matcher, self.work / name, self.recipe.checkpoint)
        return matcher, warm + iterations * per_update

    def run(self, row: str) -> dict[str, Any]:
        """Train and score one row."""
        name = row.replace(" ", "-")
        config = self.recipe.distill.matching.model_copy(update=MATCHING.get(row, {}))
        result: dict[str, Any] = {"row": row, "steps": self.steps, "seed": self.seed}
        if row == "trajectory":
            changes = {"iterations": round(self.budget / 3), "batch": config.batch}  # F is per sample: batch sizes must be equal
            longer = self.recipe.distill.trajectory.model_copy(update=changes)
            student = self.base.requires_grad_(True)
            regress(student, self.replay, self.nodes, longer, self.seed + 100, self.work / name, self.recipe.checkpoint)
            result["forwards"] = 3.0 * longer.iterations
        elif row in MATCHING:
            matcher, result["forwards"] = self.match(name, self.base, config, self.budget)
            student, result["per_update"] = matcher.student, self.cost(config)
            if matcher.adversarial is None:
                result |= gradient_variance(matcher)
        else:
            student, result["forwards"] = self._second_half(row, name)
        return result | self.ruler.score(student.requires_grad_(False), self.sampler)

    def experts(self) -> tuple[nn.Module, nn.Module, float]:
        """(high, low, F spent on both): branches of the half-way student, rollouts through both, a fake score each."""
        split, (half, fake_score) = self.recipe.finetune.split, self.half()
        high, low, spent = copy.deepcopy(half), copy.deepcopy(half), 0.0
        sides = (("high", high, [i for i, s in enumerate(self.nodes[:-1]) if s > split]),
                 ("low", low, [i for i, s in enumerate(self.nodes[:-1]) if s <= split]))  # fmt: skip
        for turn, (side, branch, train_nodes) in enumerate(sides, 2):
            options = {"train_nodes": train_nodes, "net_at": lambda sigma: high if sigma > split else low}
            options["fake_score"] = copy.deepcopy(fake_score)
            spent += self.match(f"experts-{side}", branch, self._warm(), self.budget / 4, turn, **options)[1]
        return high, low, spent

    def _warm(self) -> MatchingTraining:
        """Settings of the second half, which continues with the fake score of the first."""
        return self.recipe.distill.matching.model_copy(update={"fake_score_warmup": 0})

    def _second_half(self, row: str, name: str) -> tuple[nn.Module, float]:
        if row == "control":
            half, fake_score = self.half()
            matcher, spent = self.match(name, half, self._warm(), self.budget / 2, 1, fake_score=fake_score)
            return matcher.student, self.budget / 2 + spent
        high, low, spent = self.experts()
        if row == "two experts":
            return Experts(high, low, self.recipe.finetune.split), self.budget / 2 + spent
        merged, scores = copy.deepcopy(high), {}
        for ratio in self.recipe.finetune.merge_high:
            merge(merged, high, low, ratio)
            with replaced_transformer(self.pipe, merged):
                scores[ratio] = judge(self.stage, self.pipe, self.sampler).mean
        merge(merged, high, low, max(scores, key=lambda ratio: scores[ratio]))
        return merged, self.budget / 2 + spent
