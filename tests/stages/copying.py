"""A small real stage for tests of the runner: it copies the weights of its input, one letter more per run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

from flashgen.artifact.draft import Draft
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import Result, Stage, Takes
from flashgen.stages.planning import Plan

WEIGHTS = "vae/w.safetensors"


class Copy(Stage):
    """Student to student. `made` lists what each draft found in its work folder; hooks raise, wait or count for a test."""

    name = "copy"
    takes: ClassVar[Takes] = {"student": ("student",)}
    kind = "student"
    made: ClassVar[list[list[str]]] = []
    error: ClassVar[BaseException | None] = None  # raised by `make`, with a checkpoint behind it
    refusal: ClassVar[Exception | None] = None  # raised by `check`
    needs: ClassVar[Plan | Exception | None] = None

    def check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def settings(self) -> dict[str, Any]:
        return {"bits": self.recipe.quantize.bits}

    def plan(self) -> Plan | None:
        if isinstance(self.needs, Exception):
            raise self.needs
        return self.needs

    def make(self, draft: Draft) -> Result:
        self.made.append(sorted(path.name for path in draft.work.iterdir()))
        (draft.work / "checkpoint").write_text("step 7")
        (draft.path / "half").write_text("unfinished")
        if self.error is not None:
            raise self.error
        (draft.path / "half").unlink()
        (draft.path / "vae").mkdir()
        (draft.path / WEIGHTS).write_text((self.source.path / WEIGHTS).read_text() + "x")
        return Result(None, {"letters": 1}, {"note": "copied"}, validate=False)


class Waiting(Copy):
    """Says that it works, then waits for a line on stdin."""

    def make(self, draft: Draft) -> Result:
        (draft.work / "checkpoint").write_text("step 7")
        print("making", flush=True)
        sys.stdin.readline()
        return super().make(draft)


if __name__ == "__main__":
    from flashgen.stages.base import run

    run(Waiting, {"student": sys.argv[1]}, Path(sys.argv[2]), Recipe(name="test"))
