"""Three roles on one backbone: equal at first, apart afterwards, and never each other's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.recipe.schema import LoraTraining, MatchingTraining
from flashgen.training.matching import Matcher, couple, train_matching
from flashgen.training.prompts import PromptPool
from flashgen.training.roles import Role, interpolate, roles_on
from flashgen.training.trajectories import Replay, velocity

Build = Callable[[int], nn.Module]
SHAPE = (16, 4, 4)
LORA = LoraTraining(rank=4)


def speak(net: nn.Module, pool: PromptPool) -> Tensor:
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(3))
    return velocity(net, x, torch.linspace(0.1, 1, 8), pool.cond)


def shake(role: Role, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def test_all_roles_equal_the_backbone_exactly_at_first(transformer: Build, pool: PromptPool) -> None:
    plain = transformer(0)
    with torch.no_grad():
        expected = speak(plain, pool)
        roles = roles_on(copy.deepcopy(plain), LORA, "student", "proxy", seed=0)
        assert all(torch.equal(speak(role, pool), expected) for role in roles)
    teacher, student, proxy = roles
    assert not list(teacher.parameters())
    names = [{name for name, _ in role.named_parameters()} for role in (student, proxy)]
    assert names[0] and not names[0] & names[1] and all(p.requires_grad for p in student.parameters())
    assert len(names[0]) == 2 * len([n for n in names[0] if "lora_A" in n]) and len(names[0]) == len(names[1])


def test_a_role_changes_alone(transformer: Build, pool: PromptPool) -> None:
    teacher, student, proxy = roles_on(transformer(0), LORA, "student", "proxy", seed=0)
    with torch.no_grad():
        before = speak(teacher, pool)
        shake(student, 1)
        assert not torch.allclose(speak(student, pool), before, atol=1e-3)
        assert torch.equal(speak(proxy, pool), before) and torch.equal(speak(teacher, pool), before)
        dense = transformer(0)
        assert sorted(student.names()) == sorted(dense.state_dict())
        dense.load_state_dict({name: student.merged(name) for name in student.names()})
        assert torch.allclose(speak(dense, pool), speak(student, pool), atol=1e-5) and torch.equal(speak(teacher, pool), before)


def test_coupled_adapters_are_coupled_networks_while_they_share_an_a(transformer: Build, pool: PromptPool) -> None:
    """A and B are averaged apart; both begin with the same A, so that the product is averaged, too."""
    _, student, proxy = roles_on(transformer(0), LORA, "student", "proxy", seed=0)
    for seed, role in enumerate((student, proxy)):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in role.named_parameters():
                if ".lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g))
    expected = interpolate(student, proxy, 0.1)
    couple(proxy, student, 0.9)
    for name, tensor in expected.items():
        torch.testing.assert_close(proxy.merged(name), tensor, rtol=1e-4, atol=1e-4)


def test_a_base_in_bf16_has_adapters_in_fp32_and_speaks_fp32(transformer: Build, pool: PromptPool) -> None:
    lora = LORA.model_copy(update={"checkpointing": True})
    teacher, student = roles_on(transformer(0).to(torch.bfloat16), lora, "student", seed=0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    shake(student, 1)
    said = speak(student, pool)
    assert said.dtype == torch.float32
    torch.autograd.backward(said.square().mean())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        assert torch.allclose(speak(teacher, pool), speak(transformer(0), pool), atol=0.05)
        name = "transformer_blocks.0.attn.to_q.weight"
        assert student.merged(name).dtype == torch.float32 and not torch.equal(student.merged(name), teacher.merged(name))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_never_mix_even_when_another_role_works_before_the_backward(
    checkpointing: bool, transformer: Build, pool: PromptPool
) -> None:
    """With checkpoints the student's blocks run again in the backward pass, while the proxy's adapter is at work."""
    expected: dict[str, Tensor] = {}
    for switched in (False, True):
        lora = LORA.model_copy(update={"checkpointing": checkpointing and switched})
        teacher, student, proxy = roles_on(transformer(0), lora, "student", "proxy", seed=0)
        shake(student, 1)
        shake(proxy, 2)
        loss = speak(student, pool).square().mean()
        if switched:
            with torch.no_grad():
                speak(proxy, pool), speak(teacher, pool)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        assert len(found) == len(list(student.parameters()))
        assert all(p.grad is None for p in proxy.parameters())
        expected = expected or found
        assert all(torch.allclose(found[name], expected[name], atol=1e-7, rtol=1e-4) for name in expected)


def test_state_is_the_adapters_alone_and_comes_back(transformer: Build, pool: PromptPool) -> None:
    _, student, proxy = roles_on(transformer(0), LORA, "student", "proxy", seed=0)
    shake(student, 1)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        before = speak(student, pool)
        shake(student, 5)
        student.load_state_dict(state)
        assert torch.equal(speak(student, pool), before)
    with pytest.raises(ValueError, match="not the state of adapter proxy"):
        proxy.load_state_dict(state)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_interpolation_of_adapters_is_that_of_their_dense_weights(weight: float, transformer: Build, pool: PromptPool) -> None:
    plain = transformer(0)
    _, high, low = roles_on(copy.deepcopy(plain), LORA, "high", "low", seed=0)
    shake(high, 1)
    shake(low, 2)
    found = interpolate(high, low, weight)
    assert found.keys() == plain.state_dict().keys()
    for name in (n for n in found if "to_q.weight" in n):
        product = {
            role.adapter: [p for k, p in role.named_parameters() if name.removesuffix(".weight") + ".lora_" in k] for role in (high, low)
        }
        delta = [b @ a for a, b in product.values()]
        exact = plain.state_dict()[name] + weight * delta[0] + (1 - weight) * delta[1]
        assert torch.allclose(found[name], exact, atol=1e-6)


def test_matching_trains_the_adapters_and_leaves_the_backbone(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    base = transformer(0)
    teacher, student, proxy = roles_on(base, LORA, "student", "proxy", seed=0)
    frozen = {n: p.detach().clone() for n, p in base.named_parameters() if "lora_" not in n}
    config = MatchingTraining(iterations=2, batch=3, lr=1e-2, proxy_lr=1e-2, ema=0.5, node_adversarial=[0.0])
    matcher = Matcher("m", student, teacher, pool, [1.0, 0.75, 0.0], config, SHAPE, 0, t5_drop=0.0, proxy=proxy)
    train_matching(matcher, tmp_path)
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if n in frozen)
    moved = [p.any() for n, p in [*student.named_parameters(), *proxy.named_parameters()] if "attn.to_q.lora_B" in n]
    assert len(moved) == 4 and all(moved)
    saved = torch.load(tmp_path / "m.pt", weights_only=True)["state"]
    assert all("lora_" in name for part in ("student", "proxy") for name in saved[part])


def test_heads_judge_a_backbone_in_bf16(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    """The recipe of SD3.5-Medium in 24 GB, with the adversarial term: heads and adapters learn in fp32."""
    teacher, student, proxy = roles_on(transformer(0).to(torch.bfloat16), LORA, "student", "proxy", seed=0)
    before = [p.detach().clone() for p in student.parameters()]
    cached = Replay.along(torch.randn(len(pool), 3, *SHAPE).half(), pool)
    config = MatchingTraining(iterations=1, batch=3, node_matching=[0.0], node_augmentation=[0.0], node_adversarial=[1.0])
    matcher = Matcher("m", student, teacher, pool, [1.0, 0.75, 0.0], config, SHAPE, 0, t5_drop=0.0, proxy=proxy, replay=cached)
    assert matcher.heads is not None
    heads = [p.detach().clone() for p in matcher.heads.parameters()]
    train_matching(matcher, tmp_path)
    assert any(not torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))
    assert any(not torch.equal(p, b) for p, b in zip(matcher.heads.parameters(), heads, strict=True))
