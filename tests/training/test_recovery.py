"""What teaches a student to do without its T5 encoder: who sees what, and who takes gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from flashgen.flow.grid import shifted_grid
from flashgen.models.build import t5_config
from flashgen.models.specs import SPECS
from flashgen.models.text import Conditioning
from flashgen.recipe.schema import RestructureRecipe
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.recovery import (
    compact_t5,
    embedding_loss,
    own_trajectories,
    pruned_loss,
    recover,
    vision_loss,
    without_t5_tokens,
)
from flashgen.training.trajectories import velocity

SHAPE, NODES = (16, 4, 4), shifted_grid(2, 3.0)
Build = Callable[[int], nn.Module]


@pytest.fixture
def large() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(t5_config(SPECS["tiny"].t5 | {"num_layers": 4}, 40)).eval().requires_grad_(False)


@pytest.fixture
def said(pool: PromptPool, large: T5EncoderModel) -> tuple[PromptPool, Tensor]:
    """A pool whose T5 tokens are those of `large`, and their ids."""
    ids = torch.randint(40, (len(pool), 16), generator=torch.Generator().manual_seed(1))
    embeds = torch.cat([pool.cond.embeds[:, :16], large(ids)[0]], 1)
    return replace(pool, cond=Conditioning(embeds, pool.cond.pooled)), ids


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_recovery_shows_the_student_clip_tokens_only(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0)
    slim = copy.deepcopy(full).requires_grad_(True)
    lengths: set[int] = set()
    slim.register_forward_hook(lambda module, inputs, output: lengths.add(inputs[1].shape[1]))
    before = weights(full), weights(slim)
    for muon_lr in (0.0, 1e-3):
        config = RestructureRecipe(batch=4, muon_lr=muon_lr)
        recover(slim, pruned_loss(slim, replay, NODES), config, 2, 0, tmp_path / str(muon_lr))
        assert lengths == {16} and same(weights(full), before[0]) and not same(weights(slim), before[1])
        before = before[0], weights(slim)
    kept = without_t5_tokens(pool.cond, 16)
    assert isinstance(kept, Conditioning) and torch.equal(kept.embeds, pool.cond.embeds[:, :16])


def test_own_trajectories_are_the_students_own_steps(transformer: Build, pool: PromptPool) -> None:
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0)
    assert replay.starts.shape == replay.ends.shape == (len(pool), len(NODES) - 1, *SHAPE) and replay.starts.dtype == torch.float16
    with torch.no_grad():
        v = velocity(full, replay.starts[:, 1].float(), torch.full((len(pool),), NODES[1]), pool.cond)
    assert torch.allclose(replay.ends[:, 1].float(), replay.starts[:, 1].float() + (NODES[2] - NODES[1]) * v, atol=1e-2)
    assert not torch.equal(replay.starts, own_trajectories(full, pool, NODES, SHAPE, 1).starts)
    loss = pruned_loss(full, replay, NODES)(Draws(8, 3))  # it lacks what it was painted from
    assert loss.item() > 1e-6


def test_what_wants_no_gradient_stays(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    full = transformer(0)
    slim = copy.deepcopy(full)
    slim.context_embedder.requires_grad_(True)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0)
    recover(slim, pruned_loss(slim, replay, NODES), RestructureRecipe(batch=4, muon_lr=1e-3), 2, 0, tmp_path)
    changed = {name for (name, a), b in zip(slim.named_parameters(), full.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {"context_embedder.weight", "context_embedder.bias"}


def test_a_compact_encoder_is_a_smaller_t5_of_the_same_width(large: T5EncoderModel) -> None:
    small = compact_t5(large, RestructureRecipe(), 0)
    ids = torch.arange(12).reshape(2, 6)
    assert small(ids)[0].shape == large(ids)[0].shape
    assert (small.config.num_layers, small.config.num_heads, small.config.d_ff) == (1, 1, 32)
    assert torch.equal(small.shared.weight, large.shared.weight) and large.config.num_layers == 4
    assert same(weights(small), weights(compact_t5(large, RestructureRecipe(), 0)))
    wide = compact_t5(large, RestructureRecipe(layers=3, heads=2, d_ff=8), 0).config
    assert (wide.num_layers, wide.num_heads, wide.d_ff) == (3, 2, 8)


def test_the_losses_are_zero_for_the_large_encoder_itself(
    transformer: Build, said: tuple[PromptPool, Tensor], large: T5EncoderModel
) -> None:
    pool, ids = said
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0)
    small = compact_t5(large, RestructureRecipe(), 0)
    zero, other = (vision_loss(encoder, full, replay, ids, NODES)(Draws(8, 3)).item() for encoder in (large, small))
    assert zero < 1e-5 and other > 10 * zero  # states are kept in fp16
    assert embedding_loss(large, pool, ids)(Draws(8, 3)).item() < 1e-10


@pytest.mark.parametrize("kind", ["vision", "embedding"])
def test_only_the_compact_encoder_learns(
    kind: str, transformer: Build, said: tuple[PromptPool, Tensor], large: T5EncoderModel, tmp_path: Path
) -> None:
    pool, ids = said
    full, small = transformer(0), compact_t5(large, RestructureRecipe(), 0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0)
    loss = vision_loss(small, full, replay, ids, NODES) if kind == "vision" else embedding_loss(small, pool, ids)
    before = weights(full), weights(large), weights(small), loss(Draws(64, 3)).item()
    recover(small, loss, RestructureRecipe(batch=8, lr=3e-3), 40, 0, tmp_path)
    assert same(weights(full), before[0]) and same(weights(large), before[1]) and not same(weights(small), before[2])
    assert loss(Draws(64, 3)).item() < 0.8 * before[3]
