"""Judges by the words that `--judge` and the recipe's `judge` take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.errors import UsageError
from flashgen.judges.base import Judge
from flashgen.judges.command import CommandJudge
from flashgen.judges.teacher import Draw, TeacherJudge
from flashgen.judges.world import WorldJudge

if TYPE_CHECKING:
    from flashgen.worlds.base import World

CLIP_METRICS = {"clip": "clip_score", "pick": "pick_score"}
WORDS = "world, clip:WEIGHTS, pick:WEIGHTS, frechet:WEIGHTS, teacher, command:PROGRAM"


def open_judge(
    spec: str | None,
    world: World | None = None,
    teacher: Callable[[], tuple[Draw, str]] | None = None,
    reference: Path | None = None,
    timeout_s: float = 3600.0,
) -> Judge | None:
    """The judge that `spec` names; None for no judge. Without a spec it is that of `world`, if there is one.

    `teacher()` gives what draws the teacher's pictures, and its digest, for the judge `teacher`; `reference` has the real pictures for a
    Frechet distance, or their statistics. Weights are looked for, and their class checked, but nothing large is read. Raises UsageError for a spec
    that is not known or lacks something, ArtifactError for weights that cannot be used.
    """
    if spec is None:
        return WorldJudge(world) if world else None
    kind, _, rest = spec.partition(":")
    if kind == "world" and not rest:
        if world is None:
            raise UsageError("judge=world: the artifact belongs to no world that has a judge; name another judge, or none")
        return WorldJudge(world)
    if kind == "command" and rest:
        return CommandJudge(rest, timeout_s)
    if kind == "teacher" and not rest and teacher is not None:
        return TeacherJudge(*teacher())
    if kind in CLIP_METRICS and rest:
        from flashgen.judges.clip import ClipJudge

        return ClipJudge(rest, CLIP_METRICS[kind])
    if kind == "frechet" and rest:
        from flashgen.judges.frechet import FrechetJudge

        if reference is None:
            raise UsageError(f"judge={spec} compares with real pictures; --set bench.reference=FOLDER of pictures, or a .npz of statistics")
        return FrechetJudge(rest, reference)
    raise UsageError(f"judge={spec} is not known; give one of: {WORDS}")
