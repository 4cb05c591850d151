"""Terms of a student step in distribution matching: each gives a direction at x0 or a loss, and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import add_noise, expand, x0_from_v
from flashgen.flow.guidance import Guidance
from flashgen.objectives.adversarial import clamp_ratio, discriminator_loss, generator_loss
from flashgen.objectives.evaluation import evaluation_point, sigma_below
from flashgen.objectives.matching import augmentation_term, distance, matching_term, normalise, skip_term
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.pixels import slices
from flashgen.randomness import seeded
from flashgen.recipe.distillation import MatchingTraining
from flashgen.runtime.processes import sharded
from flashgen.training.cache import Replay
from flashgen.training.discriminator import Heads, block_features
from flashgen.training.loop import descend
from flashgen.training.optimizers import adam
from flashgen.training.pictures import RealPictures
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws, mean_metrics
from flashgen.training.roles import unwrap
from flashgen.training.rollout import teacher_velocities

Shape = tuple[int, ...]  # of a latent, (C, h, w)


@dataclass(frozen=True)
class Comparison:
    """Student steps of B samples, and the states at which scores are compared. States [B, C, h, w], the rest [B]; no gradient.

    A step leads from `x` at `node`, of noise level `sigma`, to `sigma_next`; `x0` is the student's estimate. Scores are compared at
    `x_eval` of level `sigma_eval`, for which `eps` is the fresh noise; decoupled guidance has a point of its own below the node, from
    `uniform_below` and `eps_below`. `rows` are the places of the samples in this process's batch.
    """

    x: Tensor
    node: Tensor
    sigma: Tensor
    sigma_next: Tensor
    x0: Tensor
    x_eval: Tensor
    sigma_eval: Tensor
    eps: Tensor
    uniform_below: Tensor
    eps_below: Tensor
    cond: Conditioning
    rows: Tensor

    def __getitem__(self, rows: Tensor) -> Comparison:
        """The samples at `rows`, indices or a mask."""
        return Comparison(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def weighted_rows(weight: Tensor) -> Tensor:
    """Rows of `weight` [B] that are not zero, or the first one where all are, so that every process calls every network."""
    rows = weight.nonzero().flatten()
    return rows if len(rows) else torch.zeros(1, dtype=torch.long, device=weight.device)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters of `modules` get no gradient inside; activations still pass it on."""
    flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class MatchingTerm:
    """Matching and augmentation (DMD, Decoupled DMD). `weights` are those of both terms per node, `guidance` is the teacher's."""

    def __init__(
        self,
        config: MatchingTraining,
        weights: Mapping[str, Tensor],
        teacher: nn.Module,
        fake_score: nn.Module,
        pool: PromptPool,
        guidance: Guidance,
    ) -> None:
        self.config, self.weights, self.teacher, self.fake_score, self.pool = config, weights, teacher, fake_score, pool
        self.guidance = guidance

    @torch.no_grad()
    def direction(self, c: Comparison) -> tuple[Tensor, dict[str, Tensor]]:
        """Direction at x0 [B, C, h, w], weighted per node and normalised per sample; and sizes of the terms and of the normaliser."""
        config = self.config
        w_match, w_augment = (self.weights[term][c.node].reshape(-1, 1, 1, 1) for term in ("matching", "augmentation"))
        x0_fake_score = x0_from_v(c.x_eval, velocity(self.fake_score, c.x_eval, c.sigma_eval, c.cond), c.sigma_eval)
        if config.augmentation == "tied":
            x0_teacher, augment, scale = self._augmentation(c, c.x_eval, c.sigma_eval)
            match = matching_term(x0_teacher, x0_fake_score)
            total = normalise(w_match * match + w_augment * augment, scale, floor=config.floor)
        else:
            x0_teacher = x0_from_v(c.x_eval, velocity(self.teacher, c.x_eval, c.sigma_eval, c.cond), c.sigma_eval)
            scale, match = distance(c.x0, x0_teacher), matching_term(x0_teacher, x0_fake_score)
            total = w_match * normalise(match, scale, floor=config.floor)
            sigma = sigma_below(c.sigma, c.uniform_below, (config.min_sigma, config.max_sigma))
            x = add_noise(c.x0, c.eps_below, sigma)  # fresh noise below the node's own level
            _, augment, own_scale = self._augmentation(c, x, sigma)
            total = total + w_augment * normalise(augment, own_scale, floor=config.floor)
            scale = torch.minimum(scale, own_scale)
        sizes = {"matching": match.abs().mean(), "augmentation": augment.abs().mean()}
        return total, {"scale_min": scale.min(), **sizes}

    def _augmentation(self, c: Comparison, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(teacher's conditional estimate, augmentation term, distance of x0 to the guided estimate) at `x` of level `sigma` [B]."""
        velocities = teacher_velocities(self.teacher, x, sigma, c.cond, self.pool.empty_for(c.cond))
        x0_teacher, x0_unconditional = (x0_from_v(x, v, sigma) for v in velocities)
        augment = augmentation_term(x0_teacher, x0_unconditional, self.guidance.weight(expand(sigma, x)))
        if self.guidance.skip:
            weight = self.guidance.skip_weight(sigma)
            rows = weighted_rows(weight)
            v_skip = velocity(self.teacher, x[rows], sigma[rows], c.cond[rows], self.guidance.skip)
            augment[rows] += skip_term(x0_teacher[rows], x0_from_v(x[rows], v_skip, sigma[rows]), expand(weight[rows], x))
        return x0_teacher, augment, distance(c.x0, x0_teacher - augment)  # x0_teacher - augment is the guided estimate


class AdversarialTerm:
    """Discriminator heads on the fake score's features, their optimizer, and the direction in which the student fools them.

    `weights` are those of the nodes; `real` are real pictures, or the ends of the trajectories of a replay, by the shape of latents.
    """

    def __init__(
        self,
        config: MatchingTraining,
        weights: Tensor,
        fake_score: nn.Module,
        real: Mapping[Shape, Replay | RealPictures],
        family: Family,
        seed: int,
    ) -> None:
        self.config, self.weights, self.fake_score, self.real = config, weights, fake_score, real
        num_blocks = len(family.blocks(unwrap(fake_score)))
        blocks = config.adversarial.blocks or [num_blocks // 2 - 1, num_blocks - 1]
        with seeded(seed):
            self.heads = Heads(blocks, family.width(unwrap(fake_score)), config.adversarial.channels).to(weights.device)
        self.optimizer = adam(list(self.heads.parameters()), config.adversarial.lr, config.betas)

    def direction(self, c: Comparison, other: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Direction at x0 [B, C, h, w], within `adversarial.band` of the size of `other`; zero at nodes without weight."""
        total, is_weighted = torch.zeros_like(other), self.weights[c.node] > 0
        rows = weighted_rows(is_weighted)
        if not is_weighted.any():
            if sharded():
                self.gradient(c[rows])  # all processes call a sharded network equally often
            return total, {}
        weighted = self.weights[c.node[rows]].reshape(-1, 1, 1, 1) * self.gradient(c[rows])
        total[rows], ratio, raw = clamp_ratio(weighted, other[rows], self.config.adversarial.band)
        return total, {"adversarial_ratio": ratio.mean(), "adversarial_raw": raw.mean()}

    def gradient(self, c: Comparison) -> Tensor:
        """Gradient of the generator loss with respect to x0, through the frozen fake score and heads, times the number of elements."""
        config = self.config
        with frozen(self.fake_score, self.heads):
            leaf = c.x0.clone().requires_grad_(True)
            v = (c.x - leaf) / c.sigma.reshape(-1, 1, 1, 1)
            x_eval = evaluation_point(config.point, c.x, v, c.sigma, c.sigma_next, c.sigma_eval, c.eps, config.last)
            loss = generator_loss(self.heads(block_features(self.fake_score, self.heads.blocks, x_eval, c.sigma_eval, c.cond)))
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient * leaf.numel()

    def fit(self, comparisons: Sequence[Comparison], draws: Draws, where: str) -> dict[str, Tensor]:
        """One step of the heads on the micro-batches of a round. Fakes are `x_eval`; real pictures are noised to the same levels."""
        shape = comparisons[0].x0.shape[1:]
        source = self.real[shape]
        pictures, noise = draws.randint(len(source.pool)), draws.randn(*shape)
        metrics: list[dict[str, Tensor]] = []

        def losses() -> Iterator[Tensor]:
            for comparison in comparisons:
                is_weighted = self.weights[comparison.node] > 0
                c = comparison[weighted_rows(is_weighted)]
                rows = pictures[c.rows]  # of trajectories only: on-policy steps end near the student
                picture, cond = source.pictures(rows), source.pool[rows]
                real = add_noise(picture, noise[c.rows], c.sigma_eval)
                logit_real, logit_fake = (self._logits(x, c.sigma_eval, cond) for x, cond in ((real, cond), (c.x_eval, c.cond)))
                loss = discriminator_loss(logit_real, logit_fake)
                metrics.append({"heads_loss": loss.detach(), "logit_real": logit_real.mean(), "logit_fake": logit_fake.mean()})
                yield is_weighted.sum() / draws.rows * loss

        descend(losses(), self.heads.parameters(), [self.optimizer], clip=self.config.clip, where=where)
        self.heads.refresh(self.config.adversarial.refresh, self.optimizer, draws.generator)
        return mean_metrics(metrics)

    def _logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Logits [B, heads] at `x`. Gradient: the heads."""
        with torch.no_grad():
            features = block_features(self.fake_score, self.heads.blocks, x, sigma, cond)
        logits: Tensor = self.heads(features)
        return logits

    def state(self) -> dict[str, Any]:
        """State that a checkpoint must hold."""
        return {"heads": self.heads, "heads_optimizer": self.optimizer}


class TrajectoryTerm:
    """Trajectory guidance from the cache on the nodes that it weighs (CrossDistill's routing); `weights` are those of `choices`.

    `replays` are the caches by the shape of latents.
    """

    def __init__(self, weights: Tensor, choices: Tensor, sigmas: Tensor, replays: Mapping[Shape, Replay]) -> None:
        self.weights, self.choices, self.sigmas, self.replays = weights.cpu(), choices, sigmas, replays

    def losses(self, student: nn.Module, draws: Draws, shape: Shape, micro_batch: int) -> Iterator[Tensor]:
        """By micro-batches, the mean of the weights times the loss at nodes drawn in proportion to them, on latents of `shape`.

        Gradient: `student`.
        """
        replay = self.replays[shape]
        node, rows = self.choices[draws.choice(self.weights)], draws.randint(len(replay))
        for part in slices(len(rows), micro_batch or len(rows)):
            x_from, x_to, cond = replay.at(rows[part], node[part])
            sigma, sigma_next = self.sigmas[node[part]], self.sigmas[node[part] + 1]
            loss = trajectory_loss(velocity(student, x_from, sigma, cond), x_from, x_to, sigma, sigma_next)
            yield len(x_from) / len(rows) * self.weights.mean() * loss
