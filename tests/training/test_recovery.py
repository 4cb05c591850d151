"""What trains a student to do without its large text encoder: who sees what, and who gets gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from flashgen.families.base import velocity
from flashgen.families.sd3.build import t5_config
from flashgen.families.sd3.restructuring import WithoutT5
from flashgen.families.sd3.specs import SPECS
from flashgen.flow.grid import shifted_grid
from flashgen.recipe.compression import RestructureRecipe
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.training.prompts import PromptPool
from flashgen.training.ranks import Draws
from flashgen.training.recovery import Ids, embedding_loss, own_trajectories, pruned_loss, recover, vision_loss

SHAPE, NODES, HOW, CHECKPOINT = (16, 4, 4), shifted_grid(2, 3.0), WithoutT5(), CheckpointRecipe()
Build = Callable[[int], nn.Module]


def encoder(layers: int, seed: int) -> T5EncoderModel:
    torch.manual_seed(seed)
    return T5EncoderModel(t5_config(SPECS["tiny"].t5 | {"num_layers": layers}, 40)).eval()


@pytest.fixture
def large() -> T5EncoderModel:
    return encoder(4, 0).requires_grad_(False)


@pytest.fixture
def encoded(pool: PromptPool, large: T5EncoderModel) -> tuple[PromptPool, Ids]:
    """A pool in which the share of the large encoder is the output of `large`, and its inputs."""
    ids = torch.randint(40, (len(pool), 16), generator=torch.Generator().manual_seed(1))
    return replace(pool, cond=HOW.with_output(pool.cond, large(ids)[0])), {"input_ids": ids}


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_recovery_shows_the_student_no_tokens_of_the_encoder(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0, tmp_path / "own0")
    slim = copy.deepcopy(full).requires_grad_(True)
    lengths: set[int] = set()
    slim.register_forward_pre_hook(lambda _, args, inputs: lengths.add(inputs["encoder_hidden_states"].shape[1]), with_kwargs=True)
    before = weights(full), weights(slim)
    for muon_lr in (0.0, 1e-3):
        config = RestructureRecipe(batch=4, muon_lr=muon_lr)
        loss = pruned_loss(slim, replay, NODES, HOW)
        recover(slim, loss, config, 2, 0, tmp_path / str(muon_lr), CHECKPOINT, blocks=pool.family.blocks(slim))
        assert lengths == {16} and same(weights(full), before[0]) and not same(weights(slim), before[1])
        before = before[0], weights(slim)


def test_own_trajectories_are_the_students_own_steps(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0, tmp_path / "own0")
    assert replay.starts.shape == replay.ends.shape == (len(pool), len(NODES) - 1, *SHAPE) and replay.starts.dtype == torch.float16
    with torch.no_grad():
        v = velocity(full, replay.starts[:, 1].float(), torch.full((len(pool),), NODES[1]), pool.cond)
    assert torch.allclose(replay.ends[:, 1].float(), replay.starts[:, 1].float() + (NODES[2] - NODES[1]) * v, atol=1e-2)
    assert not torch.equal(replay.starts, own_trajectories(full, pool, NODES, SHAPE, 1, tmp_path / "own1").starts)
    loss = pruned_loss(full, replay, NODES, HOW)(Draws(8, 3))  # the states were drawn with those tokens
    assert loss.item() > 1e-6


def test_parameters_that_require_no_gradient_stay(transformer: Build, pool: PromptPool, tmp_path: Path) -> None:
    full = transformer(0)
    slim = copy.deepcopy(full)
    slim.context_embedder.requires_grad_(True)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0, tmp_path / "own0")
    config, blocks = RestructureRecipe(batch=4, muon_lr=1e-3), pool.family.blocks(slim)
    recover(slim, pruned_loss(slim, replay, NODES, HOW), config, 2, 0, tmp_path, CHECKPOINT, blocks=blocks)
    changed = {name for (name, a), b in zip(slim.named_parameters(), full.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {"context_embedder.weight", "context_embedder.bias"}


def test_the_losses_are_zero_for_the_large_encoder_itself(
    transformer: Build, encoded: tuple[PromptPool, Ids], large: T5EncoderModel, tmp_path: Path
) -> None:
    pool, ids = encoded
    full = transformer(0)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0, tmp_path / "own0")
    zero, other = (vision_loss(net, full, replay, ids, NODES, HOW)(Draws(8, 3)).item() for net in (large, encoder(1, 1)))
    assert zero < 1e-5 and other > 10 * zero  # states are kept in fp16
    assert embedding_loss(large, pool, ids, HOW)(Draws(8, 3)).item() < 1e-10


@pytest.mark.parametrize("kind", ["vision", "embedding"])
def test_only_the_compact_encoder_learns(
    kind: str, transformer: Build, encoded: tuple[PromptPool, Ids], large: T5EncoderModel, tmp_path: Path
) -> None:
    pool, ids = encoded
    full, small = transformer(0), encoder(1, 1)
    replay = own_trajectories(full, pool, NODES, SHAPE, 0, tmp_path / "own0")
    loss = vision_loss(small, full, replay, ids, NODES, HOW) if kind == "vision" else embedding_loss(small, pool, ids, HOW)
    before = weights(full), weights(large), weights(small), loss(Draws(64, 3)).item()
    recover(small, loss, RestructureRecipe(batch=8, lr=3e-3), 40, 0, tmp_path, CHECKPOINT)
    assert same(weights(full), before[0]) and same(weights(large), before[1]) and not same(weights(small), before[2])
    assert loss(Draws(64, 3)).item() < 0.8 * before[3]
