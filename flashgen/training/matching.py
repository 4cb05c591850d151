"""Distribution matching (stage 2), also the objective of split-timestep fine-tuning (stage 3).

Four switches make the published methods recipes of one loss: where scores are compared (`point`), whether guidance has noise of
its own (`augmentation`), what the proxy is fitted on (`proxy_target`), and how much each term weighs at each node (`node_*`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashgen.flow.convert import add_noise, diffuse, x0_from_v
from flashgen.models.text import Conditioning
from flashgen.objectives.adversarial import banded, discriminator_loss, generator_loss
from flashgen.objectives.evaluation import below, evaluation_point, evaluation_sigma
from flashgen.objectives.matching import augmentation_term, distance, matching_loss, matching_term, normalise
from flashgen.objectives.proxy import interval_loss, proxy_loss
from flashgen.objectives.trajectory import average_velocity, trajectory_loss
from flashgen.recipe.schema import MatchingTraining
from flashgen.training.discriminator import Heads, Tap
from flashgen.training.loop import Best, Ema, Stateful, Watch, descend, fit, look
from flashgen.training.optimizers import muon_and_adamw, named
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.schedule import hold_then_decay, set_rates
from flashgen.training.shards import cut
from flashgen.training.trajectories import Replay, Rollout, roll_out, teacher_velocities, velocity

MATCHING_STREAM = 12
BETAS = (0.0, 0.99)  # of AdamW: no momentum, since what is followed moves with the student (DMD2, SenseFlow)


@contextmanager
def fenced(*modules: nn.Module) -> Iterator[None]:
    """No parameter of `modules` takes gradient inside; activations still pass it on."""
    flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def at_least_one(weight: Tensor) -> Tensor:
    """Rows of `weight` [B] that are not zero, or the first where there are none, so that every process asks every network."""
    rows = weight.nonzero().flatten()
    return rows if len(rows) else torch.zeros(1, dtype=torch.long)


class Matcher:
    """The networks of one run and their turns.

    An update is one rollout (N forwards), `proxy_updates` proxy steps, one student step on a random node of `train_nodes`
    (default all) and, with an adversarial weight, one step of the heads. Gradient: proxy steps change the proxy only, student
    steps the student only, head steps the heads only; the teacher never changes. With the paper's switches an update costs
    N + 3 r + 6 forward equivalents; an adversarial one about 3 more for the student and 2 for the heads, a trajectory term 3 more.
    Samples whose node weighs nothing cost neither teacher, proxy nor student.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        pool: PromptPool,
        nodes: list[float],
        config: MatchingTraining,
        shape: tuple[int, ...],
        seed: int,
        *,
        t5_drop: float,
        proxy: nn.Module | None = None,
        replay: Replay | None = None,
        train_nodes: list[int] | None = None,
        net_at: Callable[[float], nn.Module] | None = None,
    ) -> None:
        self.name, self.student, self.teacher, self.pool, self.config = name, student, teacher, pool, config
        self.nodes, self.shape, self.seed, self.t5_drop, self.replay = nodes, shape, seed, t5_drop, replay
        self.sigmas = torch.tensor(nodes)
        self.choices = torch.tensor(train_nodes if train_nodes is not None else list(range(len(nodes) - 1)))
        self.net_at = net_at or (lambda _: student)
        self.weights = {term: torch.tensor(w) for term, w in config.node_weights(len(nodes) - 1).items()}
        if replay is None and (self.weights["adversarial"][self.choices].any() or self.weights["trajectory"][self.choices].any()):
            raise ValueError("node_adversarial and node_trajectory take cached trajectories, and there are none")
        self.proxy = copy.deepcopy(teacher).requires_grad_(True) if proxy is None else proxy
        self.optimizers = muon_and_adamw(student, config.muon_lr, config.lr, betas=BETAS)
        self.proxy_optimizers = muon_and_adamw(self.proxy, config.proxy_muon_lr, config.proxy_lr, betas=BETAS)
        self.ema = Ema(student, config.ema)
        self.heads: Heads | None = None
        if self.weights["adversarial"][self.choices].any():
            torch.manual_seed(seed)
            network: Any = teacher
            layers = len(network.transformer_blocks)
            blocks = config.adversarial.blocks or [layers // 2 - 1, layers - 1]
            self.heads = Heads(blocks, network.config.num_attention_heads * network.config.attention_head_dim)
            self.heads_optimizer = torch.optim.AdamW(self.heads.parameters(), lr=config.adversarial.lr, betas=BETAS, weight_decay=0.0)

    def state(self) -> dict[str, Stateful]:
        found: dict[str, Stateful] = {
            "student": self.student, "proxy": self.proxy, "ema": self.ema,
            **named("student_", self.optimizers), **named("proxy_", self.proxy_optimizers),
        }  # fmt: skip
        return found | ({"heads": self.heads, "heads_optimizer": self.heads_optimizer} if self.heads else {})

    def update(self, step: int) -> dict[str, float]:
        """One round; the first `proxy_warmup` ones fit the proxy alone."""
        config, g = self.config, Draws(self.config.batch, self.seed, MATCHING_STREAM, step)
        noise = g.randn(*self.shape)
        rollout = roll_out(self.net_at, noise, self.pool.draw(self.t5_drop, g), self.nodes)
        losses = [self.fit_proxy(rollout, g, step) for _ in range(config.proxy_updates)]
        metrics = {"proxy_loss": sum(losses) / len(losses)}
        if step >= config.proxy_warmup:
            metrics |= self.fit_student(rollout, g, step)
            if config.proxy_coupling < 1:
                couple(self.proxy, self.student, config.proxy_coupling)
        return metrics

    def fit_proxy(self, rollout: Rollout, g: Draws, step: int) -> float:
        """On finished samples, on each step's estimate of x0, or on unfinished states with the unbiased interval target; at the noise
        levels of the points of all nodes that are trained, also of those without a weight (our choice)."""
        target, x0, eps = self.config.proxy_target, rollout.states[-1], g.randn(*self.shape)
        node = self.choices[g.randint(len(self.choices))]
        s, s_next, x, x_next = self.sigmas[node], self.sigmas[node + 1], rollout.at(node), rollout.at(node + 1)
        sigma = evaluation_sigma("interval" if target == "interval" else self.config.point, s, s_next, g.rand())
        if target == "interval":
            v = velocity(self.proxy, diffuse(x_next, eps, s_next, sigma), sigma, rollout.cond)
            loss = interval_loss(v, x_next, eps, s_next, sigma)
        else:
            if target == "step":  # the velocity of a step follows from where it led
                x0 = x0_from_v(x, average_velocity(x, x_next, s, s_next), s)
            loss = proxy_loss(velocity(self.proxy, add_noise(x0, eps, sigma), sigma, rollout.cond), x0, eps)
        descend(loss, self.proxy.parameters(), self.proxy_optimizers, clip=1.0, where=f"{self.name} proxy step {step}")
        return loss.item()

    def fit_student(self, rollout: Rollout, g: Draws, step: int) -> dict[str, float]:
        config, node = self.config, self.choices[g.randint(len(self.choices))]
        uniform, eps, kept = g.rand(), g.randn(*self.shape), self._with_weight(node)
        x, cond, node, eps = rollout.at(node)[kept], rollout.cond[kept], node[kept], eps[kept]
        sigma, sigma_next = self.sigmas[node], self.sigmas[node + 1]
        x0, x_eval, sigma_eval = self.estimate(x, node, cond, uniform[kept], eps)
        direction, metrics = self.direction(x0.detach(), x_eval, sigma, sigma_eval, node, cond, g, kept)
        if self.heads:
            rows = self.weights["adversarial"][node] > 0
            if rows.any():
                part = (x[rows], x0.detach()[rows], sigma[rows], sigma_next[rows], sigma_eval[rows], eps[rows], cond[rows])
                adversarial = self.adversarial_direction(*part)
                weight = self.weights["adversarial"][node][rows]
                scaled, ratio, raw = banded(weight.reshape(-1, 1, 1, 1) * adversarial, direction[rows], config.adversarial.band)
                direction[rows] += scaled
                metrics |= {"adversarial_ratio": ratio.mean().item(), "adversarial_raw": raw.mean().item()}
        loss = len(kept) / len(uniform) * matching_loss(x0, direction)  # rows left out have no direction, but count in the mean
        if self.weights["trajectory"][self.choices].any():
            loss = loss + self.trajectory_term(g)
        rate = hold_then_decay(step - config.proxy_warmup, config.iterations, warmup=1, decay_share=config.decay_share)
        set_rates(self.optimizers, rate)
        norm = descend(loss, self.student.parameters(), self.optimizers, clip=1.0, where=f"{self.name} step {step}")
        self.ema.update(self.student, step - config.proxy_warmup)
        if self.heads:
            judged, share = at_least_one(rows), int(rows.sum()) / len(uniform)
            metrics |= self.fit_heads(x_eval[judged], sigma_eval[judged], cond[judged], g, step, kept[judged], share)
        return {**metrics, "direction": direction.abs().mean().item(), "grad_norm": norm, "std": rollout.states[-1].std().item()}

    def estimate(self, x: Tensor, node: Tensor, cond: Conditioning, uniform: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, x_eval, sigma_eval): what the student takes `x` at its `node` [B] for, and the state and level at which scores of that are
        compared. Gradient: through x0 to the student. `uniform` [B] and `eps` are what is random about the point."""
        sigma, sigma_next = self.sigmas[node], self.sigmas[node + 1]
        v = velocity(self.student, x, sigma, cond)
        sigma_eval = evaluation_sigma(self.config.point, sigma, sigma_next, uniform)
        x_eval = evaluation_point(self.config.point, x, v.detach(), sigma, sigma_next, sigma_eval, eps, self.config.last)
        return x0_from_v(x, v, sigma), x_eval, sigma_eval

    def _with_weight(self, node: Tensor) -> Tensor:
        """Rows whose node has a weight beside the trajectory term's; at least one."""
        weight = sum(self.weights[term][node] for term in ("matching", "augmentation", "adversarial"))
        assert isinstance(weight, Tensor)
        return at_least_one(weight)

    @torch.no_grad()
    def direction(
        self,
        x0: Tensor,
        x_eval: Tensor,
        sigma: Tensor,
        sigma_eval: Tensor,
        node: Tensor,
        cond: Conditioning,
        g: Draws,
        kept: Tensor | slice = slice(None),
    ) -> tuple[Tensor, dict[str, float]]:
        """Matching and augmentation at x0, weighed by node, normalised per sample; and their sizes, the least normaliser too.

        The samples are those rows `kept` of what `g` draws.
        """
        config, empty = self.config, self.pool.empty_for(cond)
        w_match, w_augment = (self.weights[term][node].reshape(-1, 1, 1, 1) for term in ("matching", "augmentation"))
        proxy = x0_from_v(x_eval, velocity(self.proxy, x_eval, sigma_eval, cond), sigma_eval)
        if config.augmentation == "tied":
            teacher, unconditional = (
                x0_from_v(x_eval, v, sigma_eval) for v in teacher_velocities(self.teacher, x_eval, sigma_eval, cond, empty)
            )
            augment = augmentation_term(teacher, unconditional, config.guidance)
            scale = distance(x0, teacher - augment)  # teacher - augment is the guided estimate
            match = matching_term(teacher, proxy)
            total = normalise(w_match * match + w_augment * augment, scale, floor=config.floor)
        else:
            teacher = x0_from_v(x_eval, velocity(self.teacher, x_eval, sigma_eval, cond), sigma_eval)
            scale, match = distance(x0, teacher), matching_term(teacher, proxy)
            total = w_match * normalise(match, scale, floor=config.floor)
            lower = below(sigma, g.rand()[kept])  # fresh noise under the node's own level
            x = add_noise(x0, g.randn(*self.shape)[kept], lower)
            guided, unconditional = (x0_from_v(x, v, lower) for v in teacher_velocities(self.teacher, x, lower, cond, empty))
            augment = augmentation_term(guided, unconditional, config.guidance)
            own_scale = distance(x0, guided - augment)
            total = total + w_augment * normalise(augment, own_scale, floor=config.floor)
            scale = torch.minimum(scale, own_scale)
        sizes = {"matching": match.abs().mean().item(), "augmentation": augment.abs().mean().item()}
        return total, {"scale_min": scale.min().item(), **sizes}

    def adversarial_direction(
        self, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_eval: Tensor, eps: Tensor, cond: Conditioning
    ) -> Tensor:
        """Per-sample gradient of the generator loss with respect to x0, through the frozen proxy and heads; times numel a sample."""
        assert self.heads is not None
        with fenced(self.proxy, self.heads), Tap(self.proxy, self.heads.blocks) as tap:
            leaf = x0.clone().requires_grad_(True)
            v = (x - leaf) / sigma.reshape(-1, 1, 1, 1)
            x_eval = evaluation_point(self.config.point, x, v, sigma, sigma_next, sigma_eval, eps, self.config.last)
            velocity(self.proxy, x_eval, sigma_eval, cond)
            loss = generator_loss(self.heads(tap.read()))
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient * leaf.numel()

    def fit_heads(
        self, fake: Tensor, sigma: Tensor, cond: Conditioning, g: Draws, step: int, kept: Tensor, share: float
    ) -> dict[str, float]:
        """Real pictures are the ends of the leader's own trajectories, noised to the fakes' own levels; fakes are `share` of the batch."""
        assert self.heads is not None and self.replay is not None
        rows = g.randint(len(self.replay.pool))[kept]  # corrections, which come behind, end where the student led
        _, picture, cond_real = self.replay.at(rows, torch.full_like(rows, len(self.nodes) - 2))
        real = add_noise(picture, g.randn(*self.shape)[kept], sigma)
        features = []
        with torch.no_grad(), Tap(self.proxy, self.heads.blocks) as tap:
            for x, said in ((real, cond_real), (fake, cond)):
                velocity(self.proxy, x, sigma, said)
                features.append(tap.read())
        logit_real, logit_fake = (self.heads(f) for f in features)
        loss = discriminator_loss(logit_real, logit_fake)
        descend(share * loss, self.heads.parameters(), [self.heads_optimizer], clip=1.0, where=f"{self.name} heads step {step}")
        self.heads.refresh(self.config.adversarial.refresh, self.heads_optimizer, g.whole)
        return {"heads_loss": loss.item(), "logit_real": logit_real.mean().item(), "logit_fake": logit_fake.mean().item()}

    def trajectory_term(self, g: Draws) -> Tensor:
        """Trajectory guidance from the cache, beside matching, on the nodes that it weighs (CrossDistill's routing)."""
        assert self.replay is not None
        weights = self.weights["trajectory"]
        own = weights[self.choices]
        node = self.choices[g.choice(own)]
        x_from, x_to, cond = self.replay.at(g.randint(len(self.replay)), node)
        sigma, sigma_next = self.sigmas[node], self.sigmas[node + 1]
        v = velocity(self.student, x_from, sigma, cond)
        return own.mean() * trajectory_loss(v, x_from, x_to, sigma, sigma_next)


@torch.no_grad()
def couple(proxy: nn.Module, student: nn.Module, keep: float) -> None:
    """proxy <- keep proxy + (1 - keep) student (SenseFlow's implicit distribution alignment)."""
    torch._foreach_lerp_(list(proxy.parameters()), [p.detach() for p in student.parameters()], 1 - keep)


def train_matching(
    matcher: Matcher, work: Path, watch: Watch | None = None, keep_last: Callable[[], None] | None = None
) -> dict[str, float]:
    """Run `matcher` to its last round, resuming from `work`; the student ends with its EMA weights.

    Every `watch_every` rounds `watch(name, student)` sees the averaged weights. Where it returns scores, the student ends with the best
    of them, the last included, and these two are returned; `keep_last` is called while it still has the last, if that is another.
    """
    config, best = matcher.config, Best()
    total = config.proxy_warmup + config.iterations

    def step_fn(step: int) -> dict[str, float]:
        metrics = matcher.update(step)
        if step < config.proxy_warmup:
            return metrics
        seen = look(watch, matcher.name, step, total, config.watch_every, matcher.ema, matcher.student)
        if seen:
            best.offer(seen["composition"], step + 1, matcher.ema)
        return metrics | seen

    fit(matcher.name, total, step_fn, matcher.state() | {"best": best}, work)
    matcher.ema.copy_to(matcher.student)
    if not best.shadow:
        return {}
    if keep_last and best.step < total:
        keep_last()
    with torch.no_grad():
        for name, parameter in matcher.student.named_parameters():
            parameter.copy_(cut(best.shadow[name], parameter))
    return {"best": best.score, "best_step": best.step, "last": best.last}
