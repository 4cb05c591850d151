"""The chain of stages on a tiny random teacher, each run through the command line, and what its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from flashgen.artifact.store import Artifact
from flashgen.judges.base import Judgement
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from tests.cli.command import made_by

MICRO = (
    "distill.trajectory.prompts=16", "distill.trajectory.teacher_steps=4", "distill.trajectory.iterations=3", "distill.trajectory.batch=4",
    "distill.matching.iterations=2", "distill.matching.fake_score_warmup=0", "distill.matching.prompts=16", "distill.matching.batch=4",
    "finetune.matching.iterations=2", "finetune.matching.fake_score_warmup=1", "finetune.matching.prompts=16", "finetune.matching.batch=4",
    "restructure.iterations=2", "restructure.embedding=20", "restructure.prompts=16", "restructure.batch=4", "bench.per_task=1",
)  # fmt: skip
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def micro(*more: str) -> Recipe:
    """shapes-demo in seconds, with further settings."""
    return load("shapes-demo", [*MICRO, *more])


class Chain:
    """Artifacts of the chain by name, each made when it is first asked for."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def _made(self, command: str, source: Artifact, name: str, *options: str) -> Artifact:
        settings = [word for setting in MICRO for word in ("--set", setting)]
        return made_by(command, source.path, "-o", self.out / name, *options, *settings)

    @cached_property
    def teacher(self) -> Artifact:
        return made_by("teacher", "random", "--like", "tiny", "--world", "shapes", "-o", self.out / "teacher")

    @cached_property
    def student(self) -> Artifact:
        return self._made("distill", self.teacher, "student")

    @cached_property
    def finetuned(self) -> Artifact:
        return self._made("finetune", self.student, "finetuned")

    @cached_property
    def zeros(self) -> Artifact:
        return self._made("restructure-encoder", self.finetuned, "zeros", "--mode", "zeros")

    @cached_property
    def prune(self) -> Artifact:
        return self._made("restructure-encoder", self.finetuned, "prune", "--mode", "prune")

    @cached_property
    def int4(self) -> Artifact:
        return self._made("quantize", self.prune, "int4")

    @cached_property
    def device(self) -> Artifact:
        return self._made("export", self.int4, "device")

    def items(self) -> Iterator[tuple[str, Artifact]]:
        """(name, artifact) of all, in order."""
        for name in ("teacher", "student", "finetuned", "zeros", "prune", "int4", "device"):
            yield name, getattr(self, name)


def digests(artifact: Artifact) -> dict[str, str]:
    """sha256 of every file but the log, which holds wall-clock times."""
    return {f.path: f.sha256 for f in artifact.manifest.files if f.path != "stats.jsonl"}


def linked(a: Artifact, b: Artifact) -> set[str]:
    """Top-level parts of `b` whose every file is the same one on disk in `a`."""
    parts: dict[str, bool] = {}
    for file in b.manifest.files:
        part, other = file.path.split("/")[0], a.path / file.path
        parts[part] = parts.get(part, True) and other.is_file() and other.samefile(b.path / file.path)
    return {part for part, same in parts.items() if same}


def judged(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """The judge's next scores on 100 choice prompts, in the order in which it is asked."""
    from flashgen.stages import report

    answers = iter(shares)
    monkeypatch.setattr(report, "judge", lambda *arguments: Judgement((np.arange(100) < 100 * next(answers)).astype(float), {}))
