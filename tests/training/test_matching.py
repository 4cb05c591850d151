"""Stage 2: who moves, who does not, what a step costs, and which branch a rollout asks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from flashgen.flow.convert import move
from flashgen.recipe.schema import MatchingTraining
from flashgen.training import loop, matching
from flashgen.training.matching import roll_out, train_matching
from flashgen.training.prompts import PromptPool
from flashgen.training.trajectories import velocity

NODES = [1.0, 0.9, 0.75, 0.5, 0.0]
SHAPE = (16, 4, 4)
CONFIG = MatchingTraining(iterations=2, batch=3, lr=1e-2, proxy_lr=1e-2, proxy_updates=2, ema=0.5)
Build = Callable[[int], nn.Module]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trainable(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(True)


class Watch:
    """Names the proxy that `train_matching` makes of the teacher and checks the fences at every optimizer step."""

    def __init__(self, student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.student, self.teacher, self.steps = student, teacher, list[str]()

        def copy_teacher(source: nn.Module) -> nn.Module:
            assert source is teacher
            self.proxy = copy.deepcopy(source)
            return self.proxy

        def descend(loss: Tensor, *arguments: object, where: str, **options: object) -> float:
            moving, still = (self.proxy, self.student) if "proxy" in where else (self.student, self.proxy)
            before = weights(moving), weights(still)
            for parameter in still.parameters():
                parameter.grad = None
            norm = loop.descend(loss, *arguments, where=where, **options)  # type: ignore[arg-type]
            assert not same(weights(moving), before[0]) and same(weights(still), before[1])
            assert all(p.grad is None for p in [*still.parameters(), *teacher.parameters()])
            self.steps.append("proxy" if moving is self.proxy else "student")
            return norm

        monkeypatch.setattr(matching, "copy", SimpleNamespace(deepcopy=copy_teacher))
        monkeypatch.setattr(matching, "descend", descend)


def test_proxy_steps_move_the_proxy_only_student_steps_the_student_only_and_nothing_the_teacher(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = transformer(0)
    student = trainable(teacher)
    before = weights(teacher)
    watch = Watch(student, teacher, monkeypatch)
    train_matching("matching", student, teacher, pool, NODES, CONFIG, SHAPE, 0, tmp_path, t5_drop=0.5)
    assert watch.steps == ["proxy", "proxy", "student"] * 2
    assert same(weights(teacher), before) and not any(p.requires_grad for p in teacher.parameters())


def test_a_student_update_costs_the_forwards_that_its_docstring_states(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N + 3 r + 6 with a backward as two forwards: N rollout, r proxy, 1 student, 2 teacher (one doubled batch), 1 proxy."""
    teacher = transformer(0)
    student = trainable(teacher)
    calls: list[tuple[str, int, bool]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        return lambda module, inputs, output: calls.append((name, len(inputs[0]), torch.is_grad_enabled()))

    def copy_and_hook(source: nn.Module) -> nn.Module:
        proxy = copy.deepcopy(source)
        proxy.register_forward_hook(hook("proxy"))
        source.register_forward_hook(hook("teacher"))  # only now: hooks are copied along
        return proxy

    monkeypatch.setattr(matching, "copy", SimpleNamespace(deepcopy=copy_and_hook))
    student.register_forward_hook(hook("student"))
    config = CONFIG.model_copy(update={"iterations": 1})
    train_matching("matching", student, teacher, pool, NODES, config, SHAPE, 0, tmp_path, t5_drop=0.0)
    rollout, proxy = [("student", 3, False)] * 4, [("proxy", 3, True)] * 2
    assert calls == [*rollout, *proxy, ("student", 3, True), ("teacher", 6, False), ("proxy", 3, False)]
    cost = sum(rows / 3 * (3 if grad else 1) for _, rows, grad in calls)
    assert cost == 4 + 3 * 2 + 6


def test_train_matching_resumes_bit_for_bit_and_ends_in_the_average(
    transformer: Build, pool: PromptPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = transformer(0)
    config = CONFIG.model_copy(update={"iterations": 4})

    def train(work: Path) -> list[Tensor]:
        student = trainable(teacher)
        train_matching("matching", student, teacher, pool, NODES, config, SHAPE, 0, work, t5_drop=0.5)
        return weights(student)

    expected = train(tmp_path / "whole")
    saved = torch.load(tmp_path / "whole" / "matching.pt", weights_only=True)["state"]
    assert same(expected, list(saved["ema"]["shadow"].values()))
    assert not same(expected, [saved["student"][name] for name in saved["ema"]["shadow"]])

    monkeypatch.setattr(matching, "fit", lambda *a, **k: loop.fit(*a, **k, save_every_s=0.0))

    def interrupted(*arguments: object, where: str, **options: object) -> float:
        if where == "matching proxy step 2":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matching, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.setattr(matching, "descend", loop.descend)
    assert same(train(tmp_path / "cut"), expected)
    assert [json.loads(line)["step"] for line in (tmp_path / "cut" / "stats.jsonl").read_text().splitlines()] == [4]


def test_zero_iterations_leave_the_student_as_it_was(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    teacher, student = transformer(0), trainable(transformer(1))
    before = weights(student)
    config = CONFIG.model_copy(update={"iterations": 0})
    train_matching("matching", student, teacher, pool, NODES, config, SHAPE, 0, tmp_path, t5_drop=0.5)
    assert same(weights(student), before)


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

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        return lambda module, inputs, output: asked.append((name, round(inputs[3][0].item()), torch.is_grad_enabled()))

    high.register_forward_hook(hook("high"))
    low.register_forward_hook(hook("low"))
    before = weights(high), weights(low)
    train_matching(
        "low", low, teacher, pool, NODES, CONFIG, SHAPE, 0, tmp_path,
        t5_drop=0.0, train_nodes=[3], net_at=lambda sigma: high if sigma > 0.5 else low,
    )  # fmt: skip
    rollout = [("high", 1000, False), ("high", 900, False), ("high", 750, False), ("low", 500, False)]
    assert asked == [*rollout, ("low", 500, True)] * 2
    assert same(weights(high), before[0]) and not same(weights(low), before[1])


def test_proxy_warmup_moves_the_proxy_only(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    student, teacher = transformer(0), transformer(1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    config = MatchingTraining(iterations=0, proxy_warmup=2, batch=2)
    train_matching("warm", student, teacher, pool, [1.0, 0.75, 0.0], config, (16, 8, 8), 0, tmp_path, t5_drop=0.0)
    saved = torch.load(tmp_path / "warm.pt", weights_only=True)["state"]
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert any(not torch.equal(v, teacher.state_dict()[k]) for k, v in saved["proxy"].items())
