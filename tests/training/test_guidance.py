"""The teacher's guidance against diffusers' pipeline, and where on the noise levels it acts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.conditioning import concatenate
from flashgen.families.sd3.build import build_pipeline
from flashgen.families.sd3.sampling import random_sampler
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.convert import move
from flashgen.flow.grid import shifted_grid
from flashgen.flow.guidance import Guidance, levels_of_steps, total_forwards
from flashgen.flow.ode import guide
from flashgen.models.prompts import encode_prompts
from flashgen.objectives.matching import augmentation_term
from flashgen.recipe.distillation import LoraTraining, MatchingTraining, TrajectoryTraining
from flashgen.training.cache import TrajectorySource
from flashgen.training.matching import Matcher, Roles, Task
from flashgen.training.prompts import PromptPool
from flashgen.training.roles import roles_on
from flashgen.training.rollout import guidance_of
from tests.peers import in_diffusers

SHAPE, SHIFT = (16, 4, 4), 3.0
SKIP = {"blocks": [1], "scale": 2.5, "start": 0.1, "stop": 0.5}
Build = Callable[[int], nn.Module]


@pytest.mark.parametrize("steps", [8, 10])
@torch.no_grad()
def test_a_trajectory_with_skip_layer_guidance_is_that_of_diffusers(steps: int) -> None:
    spec = SPECS["tiny"]
    pipe, sampler = build_pipeline(spec, 0), random_sampler(spec)
    cond, empty = (encode_prompts(pipe, [prompt] * 2, sampler) for prompt in ("a red circle", ""))
    x, sigmas = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(1)), shifted_grid(steps, SHIFT)
    config = TrajectoryTraining.model_validate({"guidance": 4.5, "skip_layers": SKIP})
    guidance = guidance_of(config, SHIFT)
    source = TrajectorySource(pipe.transformer, sigmas, guidance, order=1)
    (ours,) = source.ends(x, cond, empty, [1.0, 0.0])

    theirs = in_diffusers(pipe)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.set_shift(1.0)  # `sigmas` are shifted already
    common = {
        "prompt": ["a red circle"] * 2, "latents": x, "sigmas": sigmas[:-1], "guidance_scale": 4.5,
        "max_sequence_length": sampler.tokens["t5"], "output_type": "latent",
    }  # fmt: skip
    skip = {f"skip_layer_guidance_{key}": SKIP[key] for key in ("scale", "start", "stop")}
    with_skip = theirs(**common, skip_guidance_layers=SKIP["blocks"], **skip).images
    torch.testing.assert_close(ours, with_skip, atol=1e-4, rtol=1e-4)
    assert (with_skip - theirs(**common).images).abs().max() > 0.01  # the blocks matter
    assert total_forwards(guidance, sigmas) == 2 * steps + sum(steps * 0.1 < i < steps * 0.5 for i in range(steps))


@pytest.mark.parametrize("steps", [7, 10, 28, 30])
@pytest.mark.parametrize(("start", "stop"), [(0.01, 0.2), (0.0, 0.3), (0.1, 0.9), (0.3, 1.0)])
def test_skip_layers_act_on_the_steps_on_which_diffusers_has_them(steps: int, start: float, stop: float) -> None:
    guidance = Guidance(1.0, skip=(1,), skip_scale=1.0, skip_interval=levels_of_steps(start, stop, SHIFT))
    acts = [bool(guidance.skip_weight(sigma)) for sigma in shifted_grid(steps, SHIFT)[:-1]]
    assert acts == [i / steps > start + 1e-9 and i / steps < stop - 1e-9 for i in range(steps)]


@torch.no_grad()
def test_a_guidance_interval_guides_between_its_levels_only_and_saves_passes(transformer: Build, pool: PromptPool) -> None:
    net, calls, sigmas = transformer(0), list[int](), [1.0, 0.9, 0.75, 0.5, 0.0]
    net.register_forward_pre_hook(lambda module, arguments, inputs: calls.append(len(inputs["hidden_states"])), with_kwargs=True)
    x, cond, empty = torch.randn(8, *SHAPE), pool.cond, pool.empty_for(pool.cond)
    guidance = Guidance(4.5, (0.5, 0.9))
    (end,) = TrajectorySource(net, sigmas, guidance).ends(x, cond, empty, [1.0, 0.0])
    assert calls == [8, 16, 16, 8] and total_forwards(guidance, sigmas) == 6  # 0.9 is inside, 0.5 is not
    for s, s_next in itertools.pairwise(sigmas):
        sigma, sigma_next = torch.full((8,), s), torch.full((8,), s_next)
        v = velocity(net, x, sigma, cond)
        x = move(x, guide(velocity(net, x, sigma, empty), v, 4.5) if s in (0.9, 0.75) else v, sigma, sigma_next)
    torch.testing.assert_close(end, x, atol=1e-4, rtol=1e-4)


def comparison(matcher: Matcher, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, term, distance) of the augmentation at `sigma` [8]."""
    task, g = matcher.task, torch.Generator().manual_seed(3)
    x, uniform = torch.randn((8, *SHAPE), generator=g), torch.rand(8, generator=g)
    node = torch.zeros(8, dtype=torch.long)
    cond = task.pool.cond
    _, c = matcher.compare(x, node, cond, [uniform, x, uniform, x], torch.arange(8))
    _, augment, scale = matcher.matching._augmentation(c, x, sigma)
    return x, augment, scale


@pytest.mark.parametrize("lora", [False, True], ids=["dense", "adapters"])
@torch.no_grad()
def test_scores_are_guided_by_the_samples_own_noise_level(lora: bool, transformer: Build, pool: PromptPool) -> None:
    teacher, student = transformer(0), transformer(1).requires_grad_(True)
    if lora:
        teacher, student, fake_score = roles_on(teacher, LoraTraining(rank=2), "s", "f", seed=0, targets=pool.family.lora_targets)
    low, high = levels_of_steps(0.1, 0.5, SHIFT)
    config = MatchingTraining.model_validate({"batch": 8, "guidance": 4.5, "guidance_interval": [0.2, 0.8], "skip_layers": SKIP})
    task = Task("matching", pool, [1.0, 0.5, 0.0], SHAPE, 0, 0.0, shift=SHIFT)
    matcher = Matcher(task, Roles(student, teacher, fake_score if lora else None), config, pool.family)
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.79, 0.85, 0.9, 0.95, 0.99])
    guided, skipped = (sigma > 0.2) & (sigma <= 0.8), (sigma > low) & (sigma < high)
    assert guided.tolist() == [False, True, True, True, False, False, False, False]
    assert skipped.tolist() == [False, False, False, True, True, True, True, False]
    x, augment, _ = comparison(matcher, sigma)
    s = sigma.reshape(-1, 1, 1, 1)
    v_c, v_u = velocity(teacher, x, sigma, pool.cond), velocity(teacher, x, sigma, pool.empty_for(pool.cond))
    v_skip = velocity(teacher, x, sigma, pool.cond, [1])
    v = v_c + 3.5 * guided.reshape(-1, 1, 1, 1) * (v_c - v_u) + 2.5 * skipped.reshape(-1, 1, 1, 1) * (v_c - v_skip)
    torch.testing.assert_close(augment, s * (v - v_c), atol=1e-4, rtol=1e-4)  # x0_c - x0_guided
    assert (v_c - v_skip).abs().max() > 1e-3


@torch.no_grad()
def test_scores_without_new_settings_are_those_of_before_bit_for_bit(transformer: Build, pool: PromptPool) -> None:
    teacher = transformer(0)
    task = Task("matching", pool, [1.0, 0.5, 0.0], SHAPE, 0, 0.0)
    matcher = Matcher(task, Roles(transformer(1).requires_grad_(True), teacher), MatchingTraining(batch=8), pool.family)
    sigma = torch.linspace(0.1, 0.9, 8)
    x, augment, _ = comparison(matcher, sigma)
    both = velocity(teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), concatenate([pool.cond, pool.empty_for(pool.cond)])).chunk(2)
    x0_c, x0_u = (x - sigma.reshape(-1, 1, 1, 1) * v for v in both)
    assert torch.equal(augment, augmentation_term(x0_c, x0_u, 4.5))
