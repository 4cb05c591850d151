"""Terms of a student step in distribution matching: each gives a direction at x0 or a loss, and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.families.base import Family, velocity
from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import add_noise, x0_from_v
from flashgen.objectives.adversarial import clamp_ratio, discriminator_loss, generator_loss
from flashgen.objectives.evaluation import evaluation_point, sigma_below
from flashgen.objectives.matching import augmentation_term, distance, matching_term, normalise
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.randomness import seeded
from flashgen.recipe.distillation import MatchingTraining
from flashgen.training.cache import Replay
from flashgen.training.discriminator import Heads, block_features
from flashgen.training.loop import descend
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.roles import unwrap
from flashgen.training.rollout import teacher_velocities


@dataclass(frozen=True)
class Comparison:
    """Student steps of B samples, and the states at which scores are compared. States [B, C, h, w], the rest [B]; no gradient.

    A step leads from `x` at `node`, of noise level `sigma`, to `sigma_next`; `x0` is the student's estimate. Scores are compared at
    `x_eval` of level `sigma_eval`, for which `eps` is the fresh noise. `rows` are the places of the samples in this process's batch.
    """

    x: Tensor
    node: Tensor
    sigma: Tensor
    sigma_next: Tensor
    x0: Tensor
    x_eval: Tensor
    sigma_eval: Tensor
    eps: Tensor
    cond: Conditioning
    rows: Tensor

    def __getitem__(self, rows: Tensor) -> Comparison:
        """The samples at `rows`, indices or a mask."""
        return Comparison(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def weighted_rows(weight: Tensor) -> Tensor:
    """Rows of `weight` [B] that are not zero, or the first one where all are, so that every process calls every network."""
    rows = weight.nonzero().flatten()
    return rows if len(rows) else torch.zeros(1, dtype=torch.long)


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
    """Matching and augmentation (DMD, Decoupled DMD). `weights` are those of both terms per node."""

    def __init__(
        self, config: MatchingTraining, weights: Mapping[str, Tensor], teacher: nn.Module, fake_score: nn.Module, pool: PromptPool
    ) -> None:
        self.config, self.weights, self.teacher, self.fake_score, self.pool = config, weights, teacher, fake_score, pool

    @torch.no_grad()
    def direction(self, c: Comparison, draws: Draws) -> tuple[Tensor, dict[str, float]]:
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
            sigma = sigma_below(c.sigma, draws.rand()[c.rows], (config.min_sigma, config.max_sigma))
            x = add_noise(c.x0, draws.randn(*c.x0.shape[1:])[c.rows], sigma)  # fresh noise below the node's own level
            _, augment, own_scale = self._augmentation(c, x, sigma)
            total = total + w_augment * normalise(augment, own_scale, floor=config.floor)
            scale = torch.minimum(scale, own_scale)
        sizes = {"matching": match.abs().mean().item(), "augmentation": augment.abs().mean().item()}
        return total, {"scale_min": scale.min().item(), **sizes}

    def _augmentation(self, c: Comparison, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(teacher's conditional estimate, augmentation term, distance of x0 to the guided estimate) at `x` of level `sigma` [B]."""
        velocities = teacher_velocities(self.teacher, x, sigma, c.cond, self.pool.empty_for(c.cond))
        x0_teacher, x0_unconditional = (x0_from_v(x, v, sigma) for v in velocities)
        augment = augmentation_term(x0_teacher, x0_unconditional, self.config.guidance)
        return x0_teacher, augment, distance(c.x0, x0_teacher - augment)  # x0_teacher - augment is the guided estimate


class AdversarialTerm:
    """Discriminator heads on the fake score's features, their optimizer, and the direction in which the student fools them.

    `weights` are those of the nodes; real pictures are the ends of the trajectories in `replay`.
    """

    def __init__(self, config: MatchingTraining, weights: Tensor, fake_score: nn.Module, replay: Replay, family: Family, seed: int) -> None:
        self.config, self.weights, self.fake_score, self.replay = config, weights, fake_score, replay
        num_blocks = len(family.blocks(unwrap(fake_score)))
        blocks = config.adversarial.blocks or [num_blocks // 2 - 1, num_blocks - 1]
        with seeded(seed):
            self.heads = Heads(blocks, family.width(unwrap(fake_score)), config.adversarial.channels)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=config.adversarial.lr, betas=config.betas, weight_decay=0.0)

    def direction(self, c: Comparison, other: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Direction at x0 [B, C, h, w], within `adversarial.band` of the size of `other`; zero at nodes without weight."""
        total, rows = torch.zeros_like(other), self.weights[c.node] > 0
        if not rows.any():
            return total, {}
        weighted = self.weights[c.node[rows]].reshape(-1, 1, 1, 1) * self.gradient(c[rows])
        total[rows], ratio, raw = clamp_ratio(weighted, other[rows], self.config.adversarial.band)
        return total, {"adversarial_ratio": ratio.mean().item(), "adversarial_raw": raw.mean().item()}

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

    def fit(self, c: Comparison, draws: Draws, where: str) -> dict[str, float]:
        """One step of the heads. Fakes are `c.x_eval`; real pictures are noised to the same levels."""
        is_weighted = self.weights[c.node] > 0
        c = c[weighted_rows(is_weighted)]
        rows = draws.randint(len(self.replay.pool))[c.rows]  # trajectories only: on-policy steps end near the student
        picture = self.replay.pictures(rows)
        real = add_noise(picture, draws.randn(*picture.shape[1:])[c.rows], c.sigma_eval)
        with torch.no_grad():
            features = [
                block_features(self.fake_score, self.heads.blocks, x, c.sigma_eval, cond)
                for x, cond in ((real, self.replay.pool[rows]), (c.x_eval, c.cond))
            ]
        logit_real, logit_fake = (self.heads(feature) for feature in features)
        loss = discriminator_loss(logit_real, logit_fake)
        share = int(is_weighted.sum()) / draws.rows
        descend(share * loss, self.heads.parameters(), [self.optimizer], clip=self.config.clip, where=where)
        self.heads.refresh(self.config.adversarial.refresh, self.optimizer, draws.generator)
        return {"heads_loss": loss.item(), "logit_real": logit_real.mean().item(), "logit_fake": logit_fake.mean().item()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"heads": self.heads, "heads_optimizer": self.optimizer}


class TrajectoryTerm:
    """Trajectory guidance from the cache on the nodes that it weighs (CrossDistill's routing); `weights` are those of `choices`."""

    def __init__(self, weights: Tensor, choices: Tensor, sigmas: Tensor, replay: Replay) -> None:
        self.weights, self.choices, self.sigmas, self.replay = weights, choices, sigmas, replay

    def loss(self, student: nn.Module, draws: Draws) -> Tensor:
        """Mean of the weights times the loss at nodes drawn in proportion to them. Gradient: `student`."""
        node = self.choices[draws.choice(self.weights)]
        x_from, x_to, cond = self.replay.at(draws.randint(len(self.replay)), node)
        sigma, sigma_next = self.sigmas[node], self.sigmas[node + 1]
        return self.weights.mean() * trajectory_loss(velocity(student, x_from, sigma, cond), x_from, x_to, sigma, sigma_next)
