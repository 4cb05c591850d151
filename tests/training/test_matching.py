"""Stage 2: who moves, who does not, what a step costs, and which branch a rollout asks."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import Conditioning
from flashgen.flow.convert import move
from flashgen.objectives.evaluation import sigma_below
from flashgen.objectives.trajectory import trajectory_loss
from flashgen.randomness import generator
from flashgen.recipe.distillation import MatchingTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training import loop, matching, terms
from flashgen.training.cache import Replay
from flashgen.training.discriminator import Heads, block_features
from flashgen.training.matching import Matcher, Roles, Task, align, train_matching
from flashgen.training.pictures import RealPictures
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.rollout import roll_out
from flashgen.training.terms import AdversarialTerm, Comparison, frozen
from tests import runs

NODES = [1.0, 0.9, 0.75, 0.5, 0.0]
SHAPE = (16, 4, 4)
CONFIG = MatchingTraining(iterations=2, batch=3, lr=1e-2, fake_score_lr=1e-2, fake_score_updates=2, ema=0.5)
EVERY_STEP = CheckpointRecipe.model_construct(every_s=0.0, share=math.inf)
Build = Callable[[int], nn.Module]


def task(pool: PromptPool, **changes: Any) -> Task:
    return Task(**{"name": "matching", "pool": pool, "nodes": NODES, "shape": SHAPE, "seed": 0, "encoder_drop": 0.5, **changes})


def train(student: nn.Module, teacher: nn.Module, config: MatchingTraining, work: Path, task: Task) -> Matcher:
    matcher = Matcher(task, Roles(student, teacher), config, task.pool.family)
    train_matching(matcher, work, EVERY_STEP)
    return matcher


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trainable(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(True)


class Watch:
    """Names the fake score that `train_matching` makes of the teacher and checks the fences at every optimizer step."""

    def __init__(self, student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.student, self.teacher, self.steps = student, teacher, list[str]()

        def copy_teacher(source: nn.Module) -> nn.Module:
            assert source is teacher
            self.fake_score = copy.deepcopy(source)
            return self.fake_score

        def descend(losses: Iterable[Tensor], *arguments: object, where: str, **options: object) -> tuple[Tensor, Tensor]:
            moving, still = (self.fake_score, self.student) if "fake score" in where else (self.student, self.fake_score)
            before = weights(moving), weights(still)
            for parameter in still.parameters():
                parameter.grad = None
            found = loop.descend(losses, *arguments, where=where, **options)  # type: ignore[arg-type]
            assert not same(weights(moving), before[0]) and same(weights(still), before[1])
            assert all(p.grad is None for p in [*still.parameters(), *teacher.parameters()])
            self.steps.append("fake_score" if moving is self.fake_score else "student")
            return found

        monkeypatch.setattr(matching, "copy", SimpleNamespace(deepcopy=copy_teacher))
        monkeypatch.setattr(matching, "descend", descend)


def test_fake_score_steps_move_the_fake_score_only_student_steps_the_student_only_and_nothing_the_teacher(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = transformer(0)
    student = trainable(teacher)
    before = weights(teacher)
    watch = Watch(student, teacher, monkeypatch)
    train(student, teacher, CONFIG, tmp_path, task(pool))
    assert watch.steps == ["fake_score", "fake_score", "student"] * 2
    assert same(weights(teacher), before) and not any(p.requires_grad for p in teacher.parameters())


def test_a_student_update_costs_the_forwards_that_its_docstring_states(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N + 3 r + 6 with a backward as two forwards: N rollout, r fake score, 1 student, 1 fake score, 2 teacher (one doubled batch)."""
    teacher = transformer(0)
    student = trainable(teacher)
    calls: list[tuple[str, int, bool]] = []

    def hook(name: str) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        return lambda module, inputs, output: calls.append((name, len(output[0]), torch.is_grad_enabled()))

    def copy_and_hook(source: nn.Module) -> nn.Module:
        fake_score = copy.deepcopy(source)
        fake_score.register_forward_hook(hook("fake_score"))
        source.register_forward_hook(hook("teacher"))  # only now: hooks are copied along
        return fake_score

    monkeypatch.setattr(matching, "copy", SimpleNamespace(deepcopy=copy_and_hook))
    student.register_forward_hook(hook("student"))
    config = CONFIG.model_copy(update={"iterations": 1})
    train(student, teacher, config, tmp_path, task(pool))
    rollout, fake_score = [("student", 3, False)] * 4, [("fake_score", 3, True)] * 2
    assert calls == [*rollout, *fake_score, ("student", 3, True), ("fake_score", 3, False), ("teacher", 6, False)]
    cost = sum(rows / 3 * (3 if grad else 1) for _, rows, grad in calls)
    assert cost == 4 + 3 * 2 + 6


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="paper"),
        pytest.param({"muon_lr": 1e-2, "fake_score_muon_lr": 1e-2, "ida": 0.9}, id="Muon"),
        pytest.param({"node_adversarial": [1.0], "adversarial": {"lr": 1e-2, "refresh": 0.5}}, id="heads that forget"),
    ],
)
def test_train_matching_resumes_bit_for_bit_and_ends_in_the_average(
    change: dict[str, Any], transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = transformer(0)
    config = MatchingTraining.model_validate(CONFIG.model_dump() | {"iterations": 4} | change)

    def run(work: Path, checkpoint: CheckpointRecipe = EVERY_STEP) -> list[Tensor]:
        student = trainable(teacher)
        matcher = Matcher(task(pool, replay=replay(pool)), Roles(student, teacher), config, pool.family)
        train_matching(matcher, work, checkpoint)
        return weights(student)

    expected = run(tmp_path / "whole", CheckpointRecipe())
    saved = runs.saved(tmp_path / "whole" / "checkpoints" / "matching")
    names = [name for name, _ in teacher.named_parameters()]
    assert same(expected, [saved[f"ema.{name}"] for name in names])
    assert not same(expected, [saved[f"student.{name}"] for name in names])

    def interrupted(*arguments: object, where: str, **options: object) -> tuple[Tensor, Tensor]:
        if where == "matching fake score step 2":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(matching, "descend", loop.descend)
    assert same(run(tmp_path / "cut"), expected)
    assert [json.loads(line)["step"] for line in (tmp_path / "cut" / "stats.jsonl").read_text().splitlines()] == [4]


def test_roll_out_is_euler_on_the_nodes_without_gradient(transformer: Build, pool: PromptPool) -> None:
    net = trainable(transformer(0))
    noise = torch.randn(8, *SHAPE)
    states = roll_out(lambda _: net, noise, pool.cond, NODES).states
    assert len(states) == 5 and torch.equal(states[0], noise) and not states[-1].requires_grad
    with torch.no_grad():
        s, s_next = torch.full((8,), 0.75), torch.full((8,), 0.5)
        assert torch.equal(states[3], move(states[2], velocity(net, states[2], s, pool.cond), s, s_next))


def test_split_rollouts_ask_the_branch_of_each_node_and_train_only_their_own(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    """As `stages.finetune` calls it: node 3 (sigma 0.5) belongs to the low branch, the others to the high one."""
    teacher, high, low = transformer(0), transformer(1), trainable(transformer(2))
    asked: list[tuple[str, float, bool]] = []

    def hook(name: str) -> Callable[[nn.Module, object, dict[str, Tensor], object], None]:
        return lambda module, _, inputs, output: asked.append((name, round(inputs["timestep"][0].item()), torch.is_grad_enabled()))

    high.register_forward_hook(hook("high"), with_kwargs=True)
    low.register_forward_hook(hook("low"), with_kwargs=True)
    before = weights(high), weights(low)
    train(low, teacher, CONFIG, tmp_path, task(pool, train_nodes=[3], net_at=lambda sigma: high if sigma > 0.5 else low))
    rollout = [("high", 1000, False), ("high", 900, False), ("high", 750, False), ("low", 500, False)]
    assert asked == [*rollout, ("low", 500, True)] * 2
    assert same(weights(high), before[0]) and not same(weights(low), before[1])


@pytest.mark.parametrize("scores", [[0.2, 0.9, 0.4], [0.1, 0.2, 0.3], None], ids=["best in the middle", "best at the end", "no judge"])
def test_the_student_ends_with_its_best_validated_weights_and_the_last_can_be_kept(
    scores: list[float] | None, transformer: Build, pool: PromptPool, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"iterations": 3, "fake_score_warmup": 1, "validate_every": 1})
    student, shown, last = trainable(transformer(0)), list[list[Tensor]](), list[list[Tensor]]()

    def validate(name: str, network: nn.Module) -> float | None:
        shown.append(weights(network))
        assert name == f"matching-{1 + len(shown):06d}"
        return scores[len(shown) - 1] if scores else None

    matcher = Matcher(task(pool), Roles(student, transformer(1)), config, pool.family)
    result = train_matching(matcher, tmp_path, EVERY_STEP, validate, lambda: last.append(weights(student)))
    if scores is None:
        assert result == {} and not last and same(weights(student), shown[-1])
        return
    best = scores.index(max(scores))
    assert result == {"best": max(scores), "best_step": 2 + best, "last": scores[-1]}
    assert same(weights(student), shown[best]) and len(shown) == 3
    assert [same(kept, shown[-1]) for kept in last] == [True] * (best < 2)


def test_fake_score_warmup_moves_the_fake_score_only(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    student, teacher = transformer(0), transformer(1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    config = MatchingTraining(iterations=0, fake_score_warmup=2, batch=2)
    train(student, teacher, config, tmp_path, task(pool, name="warm", nodes=[1.0, 0.75, 0.0], shape=(16, 8, 8)))
    saved = runs.saved(tmp_path / "checkpoints" / "warm")
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert any(not torch.equal(saved[f"fake_score.{name}"], value) for name, value in teacher.named_parameters())


def replay(pool: PromptPool) -> Replay:
    return Replay.from_states(torch.randn(len(pool), len(NODES), *SHAPE, generator=torch.Generator().manual_seed(5)).half(), pool)


class Gaussian(nn.Module):
    """The exact velocity for data N(mean, 0.25), which learns the mean; called as SD3's transformer is."""

    transformer_blocks = ()

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool, **_: Tensor) -> tuple[Tensor]:
        s = (timestep / 1000).reshape(-1, 1, 1, 1)
        factor = (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)
        return (factor * (hidden_states - (1 - s) * self.mean) - self.mean,)


@pytest.mark.parametrize("point", ["shared", "renoise", "interval"])
@pytest.mark.parametrize("augmentation", ["tied", "decoupled"])
@pytest.mark.parametrize("target", ["rollout", "step", "interval"])
def test_matching_moves_the_students_samples_to_the_teachers_distribution(
    point: str, augmentation: str, target: str, pool: PromptPool, tmp_path: Path
) -> None:
    """The mean of the student's samples goes from -1 to the teacher's 1, with every switch, also from a fake score that is off."""
    teacher, student = Gaussian(1.0).requires_grad_(False), Gaussian(-1.0)
    switches = {"point": point, "augmentation": augmentation, "fake_score_target": target, "guidance": 1.0}
    rates = {"batch": 64, "lr": 0.05, "fake_score_lr": 0.1, "iterations": 80, "ema": 0.5, "decay_share": 0.5}
    train(student, teacher, MatchingTraining.model_validate(switches | rates), tmp_path, task(pool, shape=(1, 2, 2)))
    samples = roll_out(lambda _: student, torch.zeros(8, 1, 2, 2), pool.cond, NODES).states[-1]  # zero noise leads to the mean
    assert samples.mean().item() == pytest.approx(1.0, abs=0.15)


def test_a_node_without_weight_gets_no_gradient(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    teacher, student = transformer(0), trainable(transformer(0))
    before = weights(student)
    only_third = {"node_matching": [0.0, 0.0, 1.0, 0.0], "node_augmentation": [0.0, 0.0, 1.0, 0.0]}
    config = MatchingTraining.model_validate(CONFIG.model_dump() | only_third)
    train(student, teacher, config, tmp_path, task(pool, train_nodes=[0, 1, 3]))
    # AdamW without weight decay and with a zero gradient stands still.
    assert same(weights(student), before)
    train(student, teacher, config, tmp_path / "third", task(pool, train_nodes=[2]))
    assert not same(weights(student), before)


@pytest.mark.parametrize("augmentation", ["tied", "decoupled"])
def test_rows_without_weight_are_left_out_and_change_nothing(
    augmentation: str, transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student steps to the same weights when every row is asked, whose directions are then zero where nothing weighs."""
    teacher, halves = transformer(0), [1.0, 0.0, 1.0, 0.0]
    config = CONFIG.model_copy(
        update={"batch": 6, "lr": 1e-4, "node_matching": halves, "node_augmentation": halves, "augmentation": augmentation}
    )
    asked: list[int] = []
    found = []
    for name, rows in (("some", Matcher._rows), ("all", lambda self, node: torch.arange(len(node)))):
        monkeypatch.setattr(Matcher, "_rows", rows)
        student = trainable(teacher)
        handle = teacher.register_forward_hook(lambda module, inputs, output: asked.append(len(output[0])))
        train(student, teacher, config, tmp_path / name, task(pool))
        handle.remove()
        found.append(weights(student))
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(*found, strict=True)) and not same(found[0], weights(teacher))
    half = len(asked) // 2
    assert sum(asked[:half]) < sum(asked[half:])


def test_a_finished_matcher_frees_its_networks_at_once(transformer: Build, pool: PromptPool) -> None:
    """What waits for Python's garbage collector stays on an accelerator that the next network needs."""
    student = trainable(transformer(1))
    matcher = Matcher(task(pool), Roles(student, transformer(0)), CONFIG, pool.family)
    alive = weakref.ref(student)
    matcher.update(0)
    gc.collect()
    gc.disable()
    try:
        del student, matcher
        assert alive() is None
    finally:
        gc.enable()


def test_a_term_that_needs_trajectories_says_so(transformer: Build, pool: PromptPool) -> None:
    config = CONFIG.model_copy(update={"node_trajectory": [1.0, 0.0, 0.0, 0.0]})
    with pytest.raises(ValueError, match="node_trajectory takes cached trajectories"):
        Matcher(task(pool), Roles(trainable(transformer(0)), transformer(0)), config, pool.family)


def test_heads_learn_and_push_only_on_their_turn(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student, fake score and heads: each optimizer step moves its own network and leaves no gradient in the others."""
    teacher, student = transformer(0), trainable(transformer(0))
    config = MatchingTraining.model_validate(CONFIG.model_dump() | {"node_adversarial": [1.0], "adversarial": {"lr": 1e-2}})
    matcher = Matcher(task(pool, replay=replay(pool)), Roles(student, teacher), config, pool.family)
    networks = {"student": student, "fake_score": matcher.fake_score, "heads": adversarial(matcher).heads}
    turns: list[str] = []

    def watched(losses: Iterable[Tensor], *arguments: object, where: str, **options: object) -> tuple[Tensor, Tensor]:
        own = "fake_score" if "fake score" in where else "heads" if "heads" in where else "student"
        before = {name: weights(net) for name, net in networks.items()}
        for net in networks.values():
            net.zero_grad(set_to_none=True)
        found = loop.descend(losses, *arguments, where=where, **options)  # type: ignore[arg-type]
        for name, net in networks.items():
            assert same(weights(net), before[name]) == (name != own)
            assert (name == own) or all(p.grad is None for p in net.parameters())
        turns.append(own)
        return found

    monkeypatch.setattr(matching, "descend", watched)
    monkeypatch.setattr(terms, "descend", watched)
    train_matching(matcher, tmp_path, EVERY_STEP)
    assert turns == ["fake_score", "fake_score", "student", "heads"] * 2
    row = json.loads((tmp_path / "stats.jsonl").read_text())
    low, high = config.adversarial.band
    assert low <= row["adversarial_ratio"] <= high
    assert all(p.requires_grad for net in networks.values() for p in net.parameters())  # nothing stays frozen


def matcher_of(transformer: Build, pool: PromptPool, **changes: Any) -> Matcher:
    """Of a student, a teacher and a fake score that have nothing in common."""
    config = MatchingTraining.model_validate(CONFIG.model_dump() | changes)
    student, teacher, fake_score = trainable(transformer(0)), transformer(1), trainable(transformer(2))
    return Matcher(task(pool, encoder_drop=0.0, replay=replay(pool)), Roles(student, teacher, fake_score), config, pool.family)


def adversarial(matcher: Matcher) -> AdversarialTerm:
    assert matcher.adversarial is not None
    return matcher.adversarial


def comparison(**changes: Tensor | Conditioning) -> Comparison:
    """Of four samples, one per node; fields that a test does not name must not matter."""
    nothing, node = torch.full((4, *SHAPE), torch.nan), torch.arange(4)
    sigma, sigma_next = (torch.tensor(levels)[node] for levels in (NODES[:-1], NODES[1:]))
    fields = {"x": nothing, "node": node, "sigma": sigma, "sigma_next": sigma_next, "x0": nothing, "x_eval": nothing}
    fields |= {"sigma_eval": sigma, "eps": nothing, "uniform_below": nothing[:, 0, 0, 0], "eps_below": nothing, "rows": node}
    return Comparison(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("augmentation", ["tied", "decoupled"])
def test_the_direction_is_the_formula_of_the_paper(augmentation: str, transformer: Build, pool: PromptPool) -> None:
    """DMD eq. 7 and 8 with the guided teacher, from the three networks' velocities written out; node weights beside them."""
    m = matcher_of(transformer, pool, augmentation=augmentation, node_matching=[1, 2, 1, 1], node_augmentation=[1, 0.5, 1, 0], guidance=3.0)
    rows = Draws(4, 0, 1)
    x0, x, cond = rows.randn(*SHAPE), rows.randn(*SHAPE), pool.cond[torch.arange(4)]
    sigma_eval, empty = torch.tensor([0.9, 0.75, 0.5, 0.2]), pool.empty_for(cond)
    g = Draws(4, 0, 2)
    c = comparison(x0=x0, x_eval=x, sigma_eval=sigma_eval, cond=cond, uniform_below=g.rand(), eps_below=g.randn(*SHAPE))
    direction, sizes = m.matching.direction(c)

    def clean(net: nn.Module, x: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return x - s.reshape(-1, 1, 1, 1) * velocity(net, x, s, cond)

    def size(x: Tensor) -> Tensor:
        return x.abs().mean((1, 2, 3), keepdim=True)

    teacher, fake_score = clean(m.teacher, x, sigma_eval, cond), clean(m.fake_score, x, sigma_eval, cond)
    g, scales = Draws(4, 0, 2), []
    at, lower = x, sigma_eval
    if augmentation == "decoupled":
        scales.append(size(x0 - teacher))
        lower = sigma_below(c.sigma, g.rand(), (CONFIG.min_sigma, CONFIG.max_sigma))
        at = (1 - lower).reshape(-1, 1, 1, 1) * x0 + lower.reshape(-1, 1, 1, 1) * g.randn(*SHAPE)
    with_prompt, without = clean(m.teacher, at, lower, cond), clean(m.teacher, at, lower, empty)
    scales.append(size(x0 - (without + 3.0 * (with_prompt - without))))
    w_match, w_augment = (torch.tensor(w).reshape(-1, 1, 1, 1) for w in ([1, 2, 1, 1], [1, 0.5, 1, 0]))
    expected = w_match * (fake_score - teacher) / scales[0] + w_augment * (1 - 3.0) * (with_prompt - without) / scales[-1]
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-5)
    assert sizes["scale_min"] == pytest.approx(min(float(s.min()) for s in scales), rel=1e-5) and min(map(torch.min, scales)) > CONFIG.floor


def test_the_adversarial_direction_is_the_gradient_of_the_generators_loss(transformer: Build, pool: PromptPool) -> None:
    m = matcher_of(transformer, pool, node_adversarial=[1.0], point="renoise")
    term, rows, cond = adversarial(m), Draws(4, 0, 1), pool.cond[torch.arange(4)]
    x, x0, eps, sigma_eval = rows.randn(*SHAPE), rows.randn(*SHAPE), rows.randn(*SHAPE), torch.full((4,), 0.5)
    gradient = term.gradient(comparison(x=x, x0=x0, eps=eps, sigma_eval=sigma_eval, cond=cond))

    def loss(x0: Tensor) -> float:
        with torch.no_grad():
            features = block_features(m.fake_score, term.heads.blocks, 0.5 * x0 + 0.5 * eps, sigma_eval, cond)
            return float(torch.nn.functional.softplus(-term.heads(features)).mean())

    step = 0.5 * gradient / gradient.norm()
    slope = loss(x0 + step) - loss(x0 - step)
    assert slope == pytest.approx(2 * float((gradient * step).mean()), rel=0.05) and slope > 0


def test_heads_learn_real_pictures_where_they_are_given(transformer: Build, pool: PromptPool) -> None:
    """Real pictures take the place of the ends of trajectories, of which there are none, each with its own prompt."""
    latents = torch.randn(9, *SHAPE, generator=generator(0)).half() + 3
    real = RealPictures(latents, torch.tensor([8, 2, 5]), pool.part(slice(3)))
    config = MatchingTraining.model_validate(
        CONFIG.model_dump() | {"node_adversarial": [1], "adversarial": {"lr": 1e-2, "refresh": 0.0}, "batch": 8, "lr": 1e-12}
    )
    networks = Roles(trainable(transformer(0)), transformer(1), trainable(transformer(2)))
    m = Matcher(task(pool, encoder_drop=0.0, pictures=real), networks, config, pool.family)
    assert adversarial(m).real == {SHAPE: real} and torch.equal(real.pictures(torch.tensor([2, 0])), latents[[5, 8]].float())
    margins = [row["logit_real"] - row["logit_fake"] for row in map(m.update, range(20))]
    assert margins[-1] > margins[0] + 0.5 and margins[-1] > 0.5


def test_a_student_of_the_adversary_alone_fools_the_heads(transformer: Build, pool: PromptPool) -> None:
    """The same draws again and again, so that its own steps are all that changes."""
    off = {"node_matching": [0], "node_augmentation": [0], "node_adversarial": [0, 0, 1, 0]}
    m = matcher_of(transformer, pool, **off, adversarial={"lr": 1e-12, "refresh": 0.0}, lr=1e-4, fake_score_lr=1e-12, batch=8)
    logits = [m.update(0)["logit_fake"] for _ in range(10)]
    assert logits[-1] > logits[0]


def test_heads_learn_to_tell_real_from_fake(transformer: Build, pool: PromptPool) -> None:
    m = matcher_of(
        transformer, pool, node_adversarial=[1], adversarial={"lr": 1e-2, "refresh": 0.0}, lr=1e-12, fake_score_lr=1e-12, batch=8
    )
    (real,) = adversarial(m).real.values()
    assert isinstance(real, Replay)
    real.ends.add_(3)
    margins = [row["logit_real"] - row["logit_fake"] for row in map(m.update, range(20))]
    assert margins[-1] > margins[0] + 0.5 and margins[-1] > 0.5


def test_a_fake_score_on_steps_learns_where_each_step_of_the_student_points(
    transformer: Build, pool: PromptPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's x0 at the node that was drawn, which is not where the rollout ends."""
    m, seen = matcher_of(transformer, pool, fake_score_target="step"), list[Tensor]()

    def loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        seen.append(x0)
        return (v - x0).square().mean()

    monkeypatch.setattr(matching, "fake_score_loss", loss)
    g = Draws(3, 0, 5)
    rollout = roll_out(lambda _: m.student, g.randn(*SHAPE), pool.draw(0.0, g), NODES)
    m.fit_fake_score(rollout, Draws(3, 0, 6), 0)
    again = Draws(3, 0, 6)
    again.randn(*SHAPE)
    node = m.choices[again.randint(len(m.choices))]
    with torch.no_grad():
        x, s = rollout.at(node), m.sigmas[node]
        expected = x - s.reshape(-1, 1, 1, 1) * velocity(m.student, x, s, rollout.cond)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-4)


def test_a_forgetful_head_loses_its_weights_and_its_optimizer_state(transformer: Build) -> None:
    heads = Heads([0, 1], 32, channels=8)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    features = [torch.randn(2, 32, 4, 6), torch.randn(2, 32, 4, 6)]
    heads(features).sum().backward()
    optimizer.step()
    before = weights(heads)
    assert heads.refresh(0.0, optimizer, generator(1)) == 0 and same(weights(heads), before) and len(optimizer.state) == len(before)
    state = torch.get_rng_state()
    assert heads.refresh(1.0, optimizer, generator(1)) == 2 and not same(weights(heads), before) and not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (weights(head) for head in heads.heads)
    assert not torch.equal(first[0], second[0])  # each with a seed of its own


def test_heads_start_from_the_seed_and_leave_the_global_generator_alone(transformer: Build, pool: PromptPool) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    starts = [weights(adversarial(matcher_of(transformer, pool, node_adversarial=[1.0])).heads) for _ in range(2)]
    assert same(*starts) and torch.equal(torch.get_rng_state(), state)


def test_alignment_is_the_parameterwise_average(transformer: Build) -> None:
    fake_score, student = transformer(0), transformer(1)
    expected = [0.9 * p + 0.1 * s for p, s in zip(weights(fake_score), weights(student), strict=True)]
    align(fake_score, student, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights(fake_score), expected, strict=True))


def test_frozen_modules_are_restored_after_an_error(transformer: Build) -> None:
    net = trainable(transformer(0))
    first = next(iter(net.parameters()))
    first.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in net.parameters()].count(False) == 1


def test_the_trajectory_term_pulls_towards_the_cache_on_its_nodes(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    """Matching off, trajectory on at node 0: training lowers the trajectory loss there."""
    teacher, student, cached = transformer(0), trainable(transformer(0)), replay(pool)
    off = {"node_matching": [0.0], "node_augmentation": [0.0], "node_trajectory": [1.0, 0.0, 0.0, 0.0], "iterations": 20, "batch": 8}
    config = MatchingTraining.model_validate(CONFIG.model_dump() | off)

    def loss(node: int) -> float:
        s, s_next = (torch.full((8,), NODES[node + k]) for k in (0, 1))
        x, to = cached.starts[:, node].float(), cached.ends[:, node].float()
        with torch.no_grad():
            return float(trajectory_loss(velocity(student, x, s, pool.cond), x, to, s, s_next))

    start = loss(0)
    train(student, teacher, config, tmp_path, task(pool, replay=cached))
    assert loss(0) < 0.9 * start


def test_weights_must_fit_the_steps() -> None:
    with pytest.raises(ValueError, match="node_adversarial must hold one weight >= 0 for all steps or one for each of the 4"):
        MatchingTraining(node_adversarial=[0.1, 0.2]).node_weights(4)
    assert MatchingTraining(node_matching=[0.5]).node_weights(2)["matching"] == [0.5, 0.5]


def test_muon_takes_matrices_on_both_sides_and_the_students_rates_fall(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = transformer(0)
    student = trainable(teacher)
    watch = Watch(student, teacher, monkeypatch)
    rates = {
        "lr": 1e-3,
        "muon_lr": 1e-2,
        "fake_score_lr": 1e-3,
        "fake_score_muon_lr": 2e-2,
        "decay_share": 0.5,
        "iterations": 4,
        "fake_score_warmup": 1,
    }
    matcher = train(student, teacher, CONFIG.model_copy(update=rates), tmp_path, task(pool))
    assert watch.steps == ["fake_score", "fake_score"] + ["fake_score", "fake_score", "student"] * 4
    kinds = ["Muon", "AdamWithoutMomentum"]
    assert [type(o).__name__ for o in matcher.optimizers] == [type(o).__name__ for o in matcher.fake_score_optimizers] == kinds
    last = CONFIG.lr_floor + (1 - CONFIG.lr_floor) * 0.5  # update 3 of 4, of which the last two decay
    assert [o.param_groups[0]["lr"] for o in matcher.optimizers] == pytest.approx([1e-2 * last, 1e-3 * last])
    assert [o.param_groups[0]["lr"] for o in matcher.fake_score_optimizers] == [2e-2, 1e-3]
    parts = {name.partition(".")[0] for name in runs.saved(tmp_path / "checkpoints" / "matching")}
    assert {"student_muon", "student_adamw", "fake_score_muon", "fake_score_adamw"} <= parts
