"""Judges by the words that `--judge` and the recipe's `judge` take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.errors import UsageError
from flashgen.judges.base import Judge, Pictures
from flashgen.judges.world import WorldJudge

if TYPE_CHECKING:
    from flashgen.worlds.base import World

WORDS = "world, clip:WEIGHTS, pick:WEIGHTS, frechet:WEIGHTS, teacher, command:PROGRAM"


def open_judge(
    spec: str | None,
    world: World | None = None,
    teacher: Callable[[Sequence[str], Sequence[int]], Pictures] | None = None,
    reference: Path | None = None,
    timeout_s: float = 3600.0,
) -> Judge | None:
    """The judge that `spec` names; None for no judge. Without a spec it is that of `world`, if there is one.

    `teacher(prompts, seeds)` draws the teacher's pictures for the judge `teacher`; `reference` has the real pictures for a Frechet
    distance, or their statistics. Weights are looked for, and their class checked, but nothing large is read. Raises UsageError for a spec
    that is not known or lacks something, ArtifactError for weights that cannot be used.
    """
    if spec is None:
        return WorldJudge(world) if world else None
    kind, _, rest = spec.partition(":")
    if kind == "world" and not rest:
        if world is None:
            raise UsageError("judge=world: the artifact belongs to no world that has a judge; name another judge, or none")
        return WorldJudge(world)
    raise UsageError(f"judge={spec} is not known; give one of: {WORDS}")
