"""Blocks through torch.compile (`distill.compile`): the same numbers, few graphs; hooks, adapters and checkpoints work as before."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgen.families.base import velocity
from flashgen.families.sd3 import SD3
from flashgen.randomness import generator
from flashgen.recipe.distillation import LoraTraining, MatchingTraining
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.stages.trainings import compile_blocks
from flashgen.training import loop, matching
from flashgen.training.cache import Replay
from flashgen.training.discriminator import block_features
from flashgen.training.matching import Bucket, Matcher, Roles, Task, train_matching
from flashgen.training.prompts import PromptPool
from flashgen.training.roles import roles_on, unwrap

NODES, SQUARE, WIDE = [1.0, 0.9, 0.75, 0.5, 0.0], (16, 4, 4), (16, 4, 6)
CONFIG = MatchingTraining(
    iterations=3, batch=4, lr=1e-3, fake_score_lr=1e-3, ema=0.5, node_adversarial=[0, 1, 0, 1], node_matching=[1, 0, 0.5, 0],
    node_augmentation=[1, 0, 0, 0], node_trajectory=[0, 0, 1, 0],
)  # fmt: skip
Build = Callable[[int], nn.Module]


def replay(pool: PromptPool, shape: tuple[int, ...]) -> Replay:
    return Replay.from_states(torch.randn(len(pool), len(NODES), *shape, generator=generator(5)).half(), pool)


def matcher_of(kind: str, transformer: Build, pool: PromptPool, *, compiled: bool) -> Matcher:
    """Matching at two sizes, of dense networks or adapters, with or without recomputed activations."""
    checkpointing = kind.endswith("recomputed")
    if kind.startswith("adapters"):
        lora, targets = LoraTraining(rank=4), SD3.lora_targets
        teacher, student, fake_score = roles_on(
            transformer(0), lora, "student", "fake_score", seed=0, targets=targets, checkpointing=checkpointing
        )
        roles, networks = Roles(student, teacher, fake_score), [unwrap(teacher)]
    else:
        networks = [transformer(0), transformer(1).requires_grad_(True), transformer(0).requires_grad_(True)]
        roles = Roles(networks[1], networks[0], networks[2])
        for network in networks[1:] if checkpointing else []:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
    for network in networks if compiled else []:
        compile_blocks(network, pool.family)
    others = [Bucket(WIDE, replay(pool, WIDE))]
    return Matcher(Task("matching", pool, NODES, SQUARE, 3, 0.5, replay(pool, SQUARE), others=others), roles, CONFIG, pool.family)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("kind", ["dense", "adapters, recomputed"])
def test_compiled_matching_is_the_uncompiled_one(kind: str, transformer: Build, pool: PromptPool, traced: list[str]) -> None:
    eager, compiled = (matcher_of(kind, transformer, pool, compiled=compiled) for compiled in (False, True))
    for step in range(2):
        expected, found = eager.update(step), compiled.update(step)
        assert {key: value.item() for key, value in found.items()} == pytest.approx(
            {key: value.item() for key, value in expected.items()}, rel=1e-4, abs=1e-6
        )
    assert traced == ["JointTransformerBlock.forward"] and graphs() > 0 and not torch._dynamo.utils.counters["graph_break"]


def test_other_numbers_of_rows_and_other_sizes_compile_nothing_more(transformer: Build, pool: PromptPool, traced: list[str]) -> None:
    network = transformer(0).requires_grad_(True)
    compile_blocks(network, pool.family)
    counts = []
    for rows, shape in ((3, SQUARE), (2, SQUARE), (5, WIDE), (8, SQUARE), (6, WIDE)):
        v = velocity(network, torch.randn(rows, *shape), torch.full((rows,), 0.5), pool[torch.arange(rows)])
        torch.autograd.backward(v.sum())
        counts.append(graphs())
    assert counts[0] > 0 and len(set(counts)) == 1


def test_hooks_that_come_after_the_compiler_see_every_pass(transformer: Build, pool: PromptPool, traced: list[str]) -> None:
    network, plain = transformer(0), transformer(0)
    compile_blocks(network, pool.family)
    x, sigma, cond = torch.randn(2, *SQUARE, generator=generator(1)), torch.full((2,), 0.5), pool[torch.arange(2)]
    for blocks in ([], [0], [1], [0, 1]):
        found, expected = (block_features(net, blocks, x, sigma, cond) for net in (network, plain))
        assert len(found) == len(blocks) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_a_compiled_network_is_freed_with_its_last_reference(transformer: Build, pool: PromptPool, traced: list[str]) -> None:
    network = transformer(0)
    compile_blocks(network, pool.family)
    block_features(network, [0], torch.randn(2, *SQUARE), torch.full((2,), 0.5), pool[torch.arange(2)])
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(pool.family.blocks(network)[0])
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_compiled_matching_resumes_bit_for_bit(
    transformer: Build, pool: PromptPool, traced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: Path) -> list[Tensor]:
        torch.compiler.reset()  # as in a new process, for which other numbers of rows come first
        matcher = matcher_of("dense", transformer, pool, compiled=True)
        train_matching(matcher, work, CheckpointRecipe.model_construct(every_s=0.0, share=math.inf))
        return [parameter.detach().clone() for parameter in matcher.student.parameters()]

    def interrupted(losses: Iterable[Tensor], *arguments: Any, where: str, **options: Any) -> tuple[Tensor, Tensor]:
        if where == "matching fake score step 2":
            raise KeyboardInterrupt
        return loop.descend(losses, *arguments, where=where, **options)

    expected = run(tmp_path / "whole")
    monkeypatch.setattr(matching, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(matching, "descend", loop.descend)
    assert all(torch.equal(a, b) for a, b in zip(run(tmp_path / "cut"), expected, strict=True))
