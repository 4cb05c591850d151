"""What stages refuse before any work: settings that the networks, the grids, the processes or the machine cannot follow."""

from __future__ import annotations

import json
import os
import shutil
import sys

from flashgen.artifact.store import Artifact
from flashgen.errors import MachineError, UsageError
from flashgen.processes import check_batch
from flashgen.recipe.schema import DistillRecipe, MatchingTraining


def check_grids(config: DistillRecipe) -> None:
    """Raises UsageError when even strides cannot lead through the teacher's steps."""
    if not config.strides and config.trajectory.teacher_steps % config.steps:
        given = f"distill.trajectory.teacher_steps={config.trajectory.teacher_steps} is no multiple of distill.steps={config.steps}"
        raise UsageError(f"{given}; the grids must nest")


def check_training(stage: str, source: Artifact, matching: MatchingTraining, batches: list[int]) -> None:
    """Raises UsageError, before any work, for what neither the networks nor the processes could follow."""
    layers = int(json.loads((source.path / "transformer" / "config.json").read_text())["num_layers"])
    if any(not 0 <= block < layers for block in matching.adversarial.blocks):
        given = f"{stage}.matching.adversarial.blocks={matching.adversarial.blocks}"
        raise UsageError(f"{given}: the transformer's blocks are 0 to {layers - 1}")
    for batch in batches:
        check_batch(batch)


def follows_teacher(matching: MatchingTraining, student: Artifact) -> bool:
    """Whether fine-tuning `student` needs the teacher's trajectories. Raises UsageError for weights that do not fit its steps."""
    assert student.manifest.sampler is not None
    try:
        return matching.wants_trajectories(len(student.manifest.sampler.sigmas) - 1)
    except ValueError as error:
        raise UsageError(f"finetune.matching: {error}") from error


def check_compiler(without: str) -> None:
    """Raises MachineError when torch.compile would find no C++ compiler; `without` is what `--set` turns compiling off with."""
    if name := missing_compiler():
        raise MachineError(
            f"torch.compile needs a C++ compiler and there is no '{name}'; install one (CXX names another), or --set {without}"
        )


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile would look for, where it is not there."""
    name = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # as torch._inductor looks for one
    return name if shutil.which(name) is None else None
