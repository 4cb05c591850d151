"""Three roles on one backbone: equal at first, apart afterwards, and never each other's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import compute_in, velocity
from flashgen.families.sd3 import SD3
from flashgen.recipe.distillation import LoraTraining, MatchingTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.cache import Replay
from flashgen.training.matching import Matcher, Roles, Task, align, train_matching
from flashgen.training.prompts import PromptPool
from flashgen.training.roles import Role, interpolate, unwrap
from flashgen.training.roles import roles_on as roles_with_targets
from tests import runs

Build = Callable[[int], nn.Module]
SHAPE = (16, 4, 4)
LORA = LoraTraining(rank=4)


def roles_on(transformer: nn.Module, lora: LoraTraining, *names: str, checkpointing: bool = False) -> tuple[Role, ...]:
    return roles_with_targets(transformer, lora, *names, seed=0, targets=SD3.lora_targets, checkpointing=checkpointing)


def output(net: nn.Module, pool: PromptPool) -> Tensor:
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
        expected = output(plain, pool)
        roles = roles_on(copy.deepcopy(plain), LORA, "student", "fake_score")
        assert all(torch.equal(output(role, pool), expected) for role in roles)
    teacher, student, fake_score = roles
    assert not list(teacher.parameters())
    names = [{name for name, _ in role.named_parameters()} for role in (student, fake_score)]
    assert names[0] and not names[0] & names[1] and all(p.requires_grad for p in student.parameters())
    assert len(names[0]) == 2 * len([n for n in names[0] if "lora_A" in n]) and len(names[0]) == len(names[1])


def test_a_role_gives_its_network_and_the_networks_config(transformer: Build) -> None:
    base = transformer(0)
    teacher, student = roles_on(base, LORA, "student")
    assert unwrap(student) is base is unwrap(teacher) and unwrap(base) is base
    assert student.config is base.config and not any(module is base for module in student.modules())


def test_targets_of_the_recipe_come_before_the_familys(transformer: Build) -> None:
    _, student = roles_on(transformer(0), LORA.model_copy(update={"targets": r".*attn\.to_q"}), "student")
    assert {name.split(".lora_")[0].rpartition("attn.")[2] for name, _ in student.named_parameters()} == {"to_q"}


def test_peft_reads_the_private_attributes_that_the_switch_sets(transformer: Build) -> None:
    """`Backbone.switch` sets `_disable_adapters` and `_active_adapter`; a peft that renames them must fail here."""
    teacher, student, fake_score = roles_on(transformer(0), LORA, "student", "fake_score")
    layers, learning = student.backbone.layers, [p.requires_grad for p in student.network.parameters()]
    for role in (student, fake_score, teacher, student):
        role.backbone.switch(role.adapter)
        assert all(layer.disable_adapters == (role.adapter is None) for layer in layers)
        assert role.adapter is None or all(layer.active_adapters == [role.adapter] for layer in layers)
        assert [p.requires_grad for p in student.network.parameters()] == learning  # peft's own set_adapter would change them


def test_inside_autocast_peft_casts_no_input_and_nothing_changes(transformer: Build, pool: PromptPool) -> None:
    base = transformer(0).to(torch.bfloat16)
    compute_in(base, torch.bfloat16)
    _, student = roles_on(base, LORA, "student")
    shake(student, 1)
    x = torch.ones(2, 3, 32, dtype=torch.bfloat16)
    layer = student.backbone.layers[0]
    assert layer._cast_input_dtype(x, torch.float32) is x  # what `cast_input_dtype_enabled` must do in peft
    with torch.no_grad():
        found = output(student, pool)
        for layer in student.backbone.layers:
            layer.cast_input_dtype_enabled = True
        assert torch.equal(output(student, pool), found)
    assert all(layer.cast_input_dtype_enabled for layer in roles_on(transformer(0), LORA, "student")[1].backbone.layers)


def test_noise_levels_are_never_rounded_in_a_backbone_in_bf16(transformer: Build, pool: PromptPool) -> None:
    teacher, _ = roles_on(transformer(0).to(torch.bfloat16), LORA, "student")
    seen: dict[str, Tensor] = {}
    teacher.network.register_forward_pre_hook(lambda module, _, inputs: seen.update(inputs), with_kwargs=True)
    with torch.no_grad():
        output(teacher, pool)
    dtypes = {name: value.dtype for name, value in seen.items() if isinstance(value, Tensor)}
    assert dtypes.pop("timestep") == torch.float32 and set(dtypes.values()) == {torch.bfloat16} and len(dtypes) == 3


def test_a_role_changes_alone(transformer: Build, pool: PromptPool) -> None:
    teacher, student, fake_score = roles_on(transformer(0), LORA, "student", "fake_score")
    with torch.no_grad():
        before = output(teacher, pool)
        shake(student, 1)
        assert not torch.allclose(output(student, pool), before, atol=1e-3)
        assert torch.equal(output(fake_score, pool), before) and torch.equal(output(teacher, pool), before)
        dense = transformer(0)
        assert sorted(student.names()) == sorted(dense.state_dict())
        dense.load_state_dict({name: student.merged(name) for name in student.names()})
        assert torch.allclose(output(dense, pool), output(student, pool), atol=1e-5) and torch.equal(output(teacher, pool), before)


def test_aligned_adapters_are_aligned_networks_while_they_share_an_a(transformer: Build, pool: PromptPool) -> None:
    """A and B are averaged apart; both begin with the same A, so that the product is averaged, too."""
    _, student, fake_score = roles_on(transformer(0), LORA, "student", "fake_score")
    for seed, role in enumerate((student, fake_score)):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in role.named_parameters():
                if ".lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g))
    expected = interpolate(student, fake_score, 0.1)
    align(fake_score, student, 0.9)
    for name, tensor in expected.items():
        torch.testing.assert_close(fake_score.merged(name), tensor, rtol=1e-4, atol=1e-4)


def test_a_base_in_bf16_has_adapters_in_fp32_and_gives_fp32(transformer: Build, pool: PromptPool) -> None:
    teacher, student = roles_on(transformer(0).to(torch.bfloat16), LORA, "student", checkpointing=True)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    shake(student, 1)
    v = output(student, pool)
    assert v.dtype == torch.float32
    torch.autograd.backward(v.square().mean())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        assert torch.allclose(output(teacher, pool), output(transformer(0), pool), atol=0.05)
        name = "transformer_blocks.0.attn.to_q.weight"
        assert student.merged(name).dtype == torch.float32 and not torch.equal(student.merged(name), teacher.merged(name))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_never_mix_even_when_another_role_works_before_the_backward(
    checkpointing: bool, transformer: Build, pool: PromptPool
) -> None:
    """With checkpoints the student's blocks run again in the backward pass, while the fake score's adapter is at work."""
    expected: dict[str, Tensor] = {}
    for switched in (False, True):
        recompute = checkpointing and switched
        teacher, student, fake_score = roles_on(transformer(0), LORA, "student", "fake_score", checkpointing=recompute)
        shake(student, 1)
        shake(fake_score, 2)
        loss = output(student, pool).square().mean()
        if switched:
            with torch.no_grad():
                output(fake_score, pool), output(teacher, pool)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        assert len(found) == len(list(student.parameters()))
        assert all(p.grad is None for p in fake_score.parameters())
        expected = expected or found
        assert all(torch.allclose(found[name], expected[name], atol=1e-7, rtol=1e-4) for name in expected)


def test_state_is_the_adapters_alone_and_comes_back(transformer: Build, pool: PromptPool) -> None:
    _, student, fake_score = roles_on(transformer(0), LORA, "student", "fake_score")
    shake(student, 1)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        before = output(student, pool)
        shake(student, 5)
        student.load_state_dict(state)
        assert torch.equal(output(student, pool), before)
    with pytest.raises(ValueError, match="not the state of adapter fake_score"):
        fake_score.load_state_dict(state)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_interpolation_of_adapters_is_that_of_their_dense_weights(weight: float, transformer: Build, pool: PromptPool) -> None:
    plain = transformer(0)
    _, high, low = roles_on(copy.deepcopy(plain), LORA, "high", "low")
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
    teacher, student, fake_score = roles_on(base, LORA, "student", "fake_score")
    frozen = {n: p.detach().clone() for n, p in base.named_parameters() if "lora_" not in n}
    config = MatchingTraining(iterations=2, batch=3, lr=1e-2, fake_score_lr=1e-2, ema=0.5, node_adversarial=[0.0])
    task = Task("m", pool, [1.0, 0.75, 0.0], SHAPE, 0, 0.0)
    train_matching(Matcher(task, Roles(student, teacher, fake_score), config, pool.family), tmp_path, CheckpointRecipe())
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if n in frozen)
    moved = [p.any() for n, p in [*student.named_parameters(), *fake_score.named_parameters()] if "attn.to_q.lora_B" in n]
    assert len(moved) == 4 and all(moved)
    saved = [name for name in runs.saved(tmp_path / "checkpoints" / "m") if name.startswith(("student.", "fake_score."))]
    assert saved and all("lora_" in name for name in saved)


def test_heads_judge_a_backbone_in_bf16(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    """The recipe of SD3.5-Medium in 24 GB, with the adversarial term: heads and adapters learn in fp32."""
    teacher, student, fake_score = roles_on(transformer(0).to(torch.bfloat16), LORA, "student", "fake_score")
    before = [p.detach().clone() for p in student.parameters()]
    cached = Replay.from_states(torch.randn(len(pool), 3, *SHAPE).half(), pool)
    config = MatchingTraining(iterations=1, batch=3, node_matching=[0.0], node_augmentation=[0.0], node_adversarial=[1.0])
    task = Task("m", pool, [1.0, 0.75, 0.0], SHAPE, 0, 0.0, cached)
    matcher = Matcher(task, Roles(student, teacher, fake_score), config, pool.family)
    assert matcher.adversarial is not None
    heads = [p.detach().clone() for p in matcher.adversarial.heads.parameters()]
    train_matching(matcher, tmp_path, CheckpointRecipe())
    assert any(not torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))
    assert any(not torch.equal(p, b) for p, b in zip(matcher.adversarial.heads.parameters(), heads, strict=True))
