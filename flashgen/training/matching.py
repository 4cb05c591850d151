"""Distribution matching (stage 2), also the objective of split-timestep fine-tuning (stage 3).

Four switches express the published methods as recipes of one loss: where scores are compared (`point`), whether guidance has noise of
its own (`augmentation`), what the fake score is fitted on (`fake_score_target`), and the weight of each term at each node (`node_*`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import add_noise, diffuse, x0_from_v
from flashgen.objectives.evaluation import evaluation_point, evaluation_sigma
from flashgen.objectives.fake_score import fake_score_loss, interval_loss
from flashgen.objectives.matching import matching_loss
from flashgen.objectives.trajectory import average_velocity
from flashgen.pixels import slices
from flashgen.recipe.distillation import MatchingTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import sharded
from flashgen.training.cache import Replay
from flashgen.training.checkpoint import Stateful
from flashgen.training.ema import BestWeights, Ema
from flashgen.training.loop import Metric, descend, fit
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.pictures import RealPictures
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws, mean_metrics
from flashgen.training.roles import offloads, unwrap
from flashgen.training.rollout import Rollout, guidance_of, roll_out
from flashgen.training.schedule import hold_then_decay, set_rates
from flashgen.training.terms import AdversarialTerm, Comparison, MatchingTerm, Shape, TrajectoryTerm, weighted_rows
from flashgen.training.validation import Validate, Validation

MATCHING_STREAM = 12


@dataclass(frozen=True)
class Bucket:
    """Inputs of a matching training for pictures of one size: the shape of latents, cached trajectories, real pictures."""

    shape: Shape
    replay: Replay | None = None
    pictures: RealPictures | None = None


@dataclass
class Task:
    """Inputs of a matching training: prompts, the student's `nodes`, the shape of latents, and which nodes it trains (default all).

    `net_at(sigma)` is the network that rolls out at a node (default: the student). The trajectory term needs `replay`, the
    adversarial term `pictures` or else `replay`. At most `micro_batch` samples pass together (0: all of a process), and their gradients
    add up. `shift` is that of the teacher's grid, which `skip_layers` needs. `others` are buckets of further sizes: a round is of one size,
    which all processes draw (uniformly, our choice).
    """

    name: str
    pool: PromptPool
    nodes: list[float]
    shape: Shape
    seed: int
    encoder_drop: float
    replay: Replay | None = None
    train_nodes: list[int] | None = None
    net_at: Callable[[float], nn.Module] | None = None
    micro_batch: int = 0
    shift: float = 1.0
    pictures: RealPictures | None = None
    others: Sequence[Bucket] = ()
    optimizer_bits: int = 32

    @property
    def buckets(self) -> list[Bucket]:
        """One bucket per size."""
        return [Bucket(self.shape, self.replay, self.pictures), *self.others]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.pool.device


@dataclass
class Roles:
    """The networks of a matching training. `fake_score` None: a copy of the teacher, as it should be at the start."""

    student: nn.Module
    teacher: nn.Module
    fake_score: nn.Module | None = None


class Matcher:
    """The networks of one run and their turns.

    An update is one rollout (N forwards), `fake_score_updates` fake score steps, one student step on a random one of the trained nodes
    and, with an adversarial weight, one step of the heads. Gradient: fake score steps change the fake score only, student steps the
    student only, head steps the heads only; the teacher never changes. With the paper's switches an update costs N + 3 r + 6 forward
    equivalents; an adversarial one about 3 more for the student and 2 for the heads, a trajectory term 3 more. Samples whose node
    has no weight cost neither teacher, fake score nor student.
    """

    def __init__(self, task: Task, roles: Roles, config: MatchingTraining, family: Family) -> None:
        self.task, self.config, self.student, self.teacher = task, config, roles.student, roles.teacher
        self.fake_score = copy.deepcopy(roles.teacher).requires_grad_(True) if roles.fake_score is None else roles.fake_score
        self.sigmas = torch.tensor(task.nodes, device=task.device)
        nodes = list(range(len(task.nodes) - 1)) if task.train_nodes is None else task.train_nodes
        self.choices = torch.tensor(nodes, device=task.device)
        student = roles.student
        self.net_at = task.net_at or (lambda _: student)  # no reference to this object, which would outlive its run by it
        self.weights = {term: torch.tensor(w, device=task.device) for term, w in config.node_weights(len(task.nodes) - 1).items()}
        self.optimizers, self.fake_score_optimizers = (
            muon_and_adamw(network, family.blocks(unwrap(network)), config, lr=lr, muon_lr=muon_lr, bits=task.optimizer_bits)
            for network, lr, muon_lr in (
                (self.student, config.lr, config.muon_lr),
                (self.fake_score, config.fake_score_lr, config.fake_score_muon_lr),
            )
        )
        self.ema = Ema(self.student, config.ema, offloads(self.student))
        guidance = guidance_of(config, task.shift)
        self.matching = MatchingTerm(config, self.weights, self.teacher, self.fake_score, task.pool, guidance)
        adversarial, trajectory = (self.weights[term] for term in ("adversarial", "trajectory"))
        self.adversarial: AdversarialTerm | None = None
        self.trajectory: TrajectoryTerm | None = None
        if adversarial[self.choices].any():
            real = {bucket.shape: source for bucket in task.buckets if (source := bucket.pictures or bucket.replay)}
            if len(real) < len(task.buckets):
                raise ValueError("node_adversarial takes real pictures or cached trajectories, and there are none")
            self.adversarial = AdversarialTerm(config, adversarial, self.fake_score, real, family, task.seed)
        if trajectory[self.choices].any():
            replays = {bucket.shape: bucket.replay for bucket in task.buckets if bucket.replay}
            if len(replays) < len(task.buckets):
                raise ValueError("node_trajectory takes cached trajectories, and there are none")
            self.trajectory = TrajectoryTerm(trajectory[self.choices], self.choices, self.sigmas, replays)

    def state(self) -> dict[str, Stateful]:
        """State that a checkpoint must hold."""
        state: dict[str, Stateful] = {"student": self.student, "fake_score": self.fake_score, "ema": self.ema}
        state |= named("student_", self.optimizers) | named("fake_score_", self.fake_score_optimizers)
        return state | (self.adversarial.state() if self.adversarial else {})

    def release(self) -> None:
        """Free the optimizers' states, which are of no use behind the last step."""
        for optimizer in (*self.optimizers, *self.fake_score_optimizers, *([self.adversarial.optimizer] if self.adversarial else [])):
            optimizer.state.clear()

    def parts(self, rows: int) -> list[slice]:
        """Micro-batches of `rows` samples."""
        return slices(rows, self.task.micro_batch or rows)

    def update(self, step: int) -> dict[str, Tensor]:
        """One round; returns its metrics. The first `fake_score_warmup` rounds fit the fake score alone."""
        config, task = self.config, self.task
        draws = Draws(config.batch, task.seed, MATCHING_STREAM, step, device=task.device)
        noise = draws.randn(*task.buckets[draws.one_of(len(task.buckets))].shape)
        cond = task.pool.draw(task.encoder_drop, draws)
        rollout = Rollout.join([roll_out(self.net_at, noise[part], cond[part], task.nodes) for part in self.parts(draws.rows)])
        losses = [self.fit_fake_score(rollout, draws, step) for _ in range(config.fake_score_updates)]
        metrics = {"fake_score_loss": torch.stack(losses).mean()}
        if step >= config.fake_score_warmup:
            metrics |= self.fit_student(rollout, draws, step)
            if config.ida < 1:
                align(self.fake_score, self.student, config.ida)
        return metrics

    def fit_fake_score(self, rollout: Rollout, draws: Draws, step: int) -> Tensor:
        """One step of the fake score; returns its loss.

        On finished samples, on each step's estimate of x0, or on unfinished states with the unbiased interval target; at the noise
        levels of the points of all trained nodes, also of those without a weight (our choice).
        """
        target, x0, eps = self.config.fake_score_target, rollout.states[-1], draws.randn(*rollout.states[-1].shape[1:])
        node = self.choices[draws.randint(len(self.choices))]
        s, s_next, x, x_next = self.sigmas[node], self.sigmas[node + 1], rollout.at(node), rollout.at(node + 1)
        sigma = evaluation_sigma("interval" if target == "interval" else self.config.point, s, s_next, draws.rand(), self._limits)
        if target == "step":  # the student's velocity follows from its step
            x0 = x0_from_v(x, average_velocity(x, x_next, s, s_next), s)
        noisy = diffuse(x_next, eps, s_next, sigma) if target == "interval" else add_noise(x0, eps, sigma)

        def losses() -> Iterator[Tensor]:
            for p in self.parts(len(node)):
                v, share = velocity(self.fake_score, noisy[p], sigma[p], rollout.cond[p]), len(node[p]) / len(node)
                if target == "interval":
                    yield share * interval_loss(v, x_next[p], eps[p], s_next[p], sigma[p])
                else:
                    yield share * fake_score_loss(v, x0[p], eps[p])

        where = f"{self.task.name} fake score step {step}"
        return descend(losses(), self.fake_score.parameters(), self.fake_score_optimizers, clip=self.config.clip, where=where)[0]

    def fit_student(self, rollout: Rollout, draws: Draws, step: int) -> dict[str, Tensor]:
        """One step of the student on a random trained node per sample, then one of the heads; returns metrics.

        Samples whose node has no weight are left out of every forward pass, but count in the mean.
        """
        config, name = self.config, self.task.name
        node = self.choices[draws.randint(len(self.choices))]
        shape = rollout.states[-1].shape[1:]
        uniform, eps, chosen, x = draws.rand(), draws.randn(*shape), self._rows(node), rollout.at(node)
        below = (draws.rand(), draws.randn(*shape)) if config.augmentation == "decoupled" else (uniform, eps)
        comparisons, parts = list[Comparison](), list[dict[str, Tensor]]()

        def losses() -> Iterator[Tensor]:
            for part in self.parts(len(chosen)):
                rows = chosen[part]
                noise = [tensor[rows] for tensor in (uniform, eps, *below)]
                x0, comparison = self.compare(x[rows], node[rows], rollout.cond[rows], noise, rows)
                direction, sizes = self.matching.direction(comparison)
                if self.adversarial:
                    adversarial, more = self.adversarial.direction(comparison, direction)
                    direction, sizes = direction + adversarial, sizes | more
                comparisons.append(comparison)
                parts.append({**sizes, "direction": direction.abs().mean()})
                yield len(rows) / len(uniform) * matching_loss(x0, direction)
            if self.trajectory:
                yield from self.trajectory.losses(self.student, draws, shape, self.task.micro_batch)

        update = step - config.fake_score_warmup
        rate = hold_then_decay(update, config.iterations, warmup=config.warmup, decay_share=config.decay_share, floor=config.lr_floor)
        set_rates(self.optimizers, rate)
        _, norm = descend(losses(), self.student.parameters(), self.optimizers, clip=config.clip, where=f"{name} step {step}")
        self.ema.update(self.student, update)
        metrics = mean_metrics(parts)
        if self.adversarial:
            metrics |= self.adversarial.fit(comparisons, draws, f"{name} heads step {step}")
        return {**metrics, "grad_norm": norm, "std": rollout.states[-1].std()}

    def compare(self, x: Tensor, node: Tensor, cond: Conditioning, noise: list[Tensor], rows: Tensor) -> tuple[Tensor, Comparison]:
        """(x0, comparison) of the student's steps from `x` [B, C, h, w] at `node` [B]. Gradient: through x0 to the student.

        `noise` is (uniform [B], eps [B, C, h, w]) of the point, then of decoupled guidance; `rows` are the places of the samples in the
        batch.
        """
        uniform, eps, uniform_below, eps_below = noise
        config, sigma, sigma_next = self.config, self.sigmas[node], self.sigmas[node + 1]
        v = velocity(self.student, x, sigma, cond)
        sigma_eval = evaluation_sigma(config.point, sigma, sigma_next, uniform, self._limits)
        x_eval = evaluation_point(config.point, x, v.detach(), sigma, sigma_next, sigma_eval, eps, config.last)
        x0 = x0_from_v(x, v, sigma)
        return x0, Comparison(x, node, sigma, sigma_next, x0.detach(), x_eval, sigma_eval, eps, uniform_below, eps_below, cond, rows)

    @property
    def _limits(self) -> tuple[float, float]:
        return self.config.min_sigma, self.config.max_sigma

    def _rows(self, node: Tensor) -> Tensor:
        """Rows whose node has a weight other than the trajectory term's; at least one. All rows where networks are sharded."""
        if sharded():  # a process with fewer micro-batches would call them less often than the others
            return torch.arange(len(node), device=node.device)
        weights = torch.stack([self.weights[term] for term in ("matching", "augmentation", "adversarial")])
        return weighted_rows(weights.sum(0)[node])


@torch.no_grad()
def align(fake_score: nn.Module, student: nn.Module, keep: float) -> None:
    """fake score <- keep * fake score + (1 - keep) * student (SenseFlow's implicit distribution alignment)."""
    torch._foreach_lerp_(list(fake_score.parameters()), [p.detach() for p in student.parameters()], 1 - keep)


def train_matching(
    matcher: Matcher,
    work: Path,
    checkpoint: CheckpointRecipe,
    validate: Validate | None = None,
    keep_last: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Run `matcher` to its last round, resuming from `work`; the student ends with its EMA weights.

    Every `validate_every` rounds `validate` gets the student with these. Where it returns scores, the student ends with the best-scoring
    EMA weights, and {best, best_step, last} is returned; `keep_last` is called before, while it still has the last ones, if they differ.
    """
    config, best = matcher.config, BestWeights(matcher.ema)
    total = config.fake_score_warmup + config.iterations
    validation = Validation(validate, matcher.task.name, total, config.validate_every)

    def step_fn(step: int) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {**matcher.update(step)}
        if step < config.fake_score_warmup:
            return metrics
        scores = validation.after(step, matcher.ema, matcher.student)
        if scores:
            best.offer(scores["score"], step + 1)
        return metrics | scores

    fit(matcher.task.name, total, step_fn, matcher.state() | {"best": best}, work, checkpoint)
    matcher.ema.copy_to(matcher.student)
    if not best.shadow:
        return {}
    if keep_last and best.step < total:
        keep_last()
    best.copy_to(matcher.student)
    return {"best": best.score, "best_step": best.step, "last": best.last}
