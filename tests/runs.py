"""Stages and commands as functions, for tests: `runs.distill(teacher, out, recipe)`.

Stages are imported when they run, so that a test needs only the modules of the stages that it calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flashgen.artifact.store import Artifact
from flashgen.pixels import Size
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import Stage, prepare, run
from flashgen.stages.describe import describe
from flashgen.stages.inputs import RecipeChoice, open_input

DEVICE: ContextVar[str] = ContextVar("device", default="cpu")  # of every run; tests/test_accelerator.py changes it
STAGES = {
    "train": "teacher.Train", "import": "teacher.Import", "random": "teacher.Random", "distill": "distill.Distill",
    "finetune": "finetune.Finetune", "restructure": "restructure.RestructureEncoder", "quantize": "quantize.Quantize",
    "export": "export.Export",
}  # fmt: skip


def stage(name: str) -> type[Stage]:
    """The class of a stage by the name of its function below."""
    module, _, attribute = STAGES[name].partition(".")
    kind: type[Stage] = getattr(importlib.import_module(f"flashgen.stages.{module}"), attribute)
    return kind


def distill(teacher: str | Path, out: Path, recipe: Recipe, seed: int = 0, force: bool = False) -> Artifact:
    return run(stage("distill"), {"teacher": teacher}, out, recipe, seed, force, device=DEVICE.get())


def finetune(student: str | Path, out: Path, recipe: Recipe, seed: int = 0, force: bool = False) -> Artifact:
    return run(stage("finetune"), {"student": student}, out, recipe, seed, force, device=DEVICE.get())


def restructure(student: str | Path, out: Path, recipe: Recipe, seed: int = 0, force: bool = False, mode: str = "prune") -> Artifact:
    return run(stage("restructure"), {"student": student}, out, recipe, seed, force, device=DEVICE.get(), mode=mode)


def quantize(student: str | Path, out: Path, recipe: Recipe, seed: int = 0, force: bool = False) -> Artifact:
    return run(stage("quantize"), {"student": student}, out, recipe, seed, force, device=DEVICE.get())


def export(student: str | Path, out: Path, recipe: Recipe, seed: int = 0, force: bool = False, **options: Any) -> Artifact:
    return run(stage("export"), {"student": student}, out, recipe, seed, force, device=DEVICE.get(), **options)


def random(
    like: str, out: Path, seed: int = 0, force: bool = False, *, layers: int | None = None, world: str | None = "shapes"
) -> Artifact:
    return run(stage("random"), {}, out, RecipeChoice(), seed, force, device=DEVICE.get(), like=like, layers=layers, of_world=world)


def train(recipe: Recipe, out: Path, seed: int = 0, force: bool = False) -> Artifact:
    return run(stage("train"), {}, out, recipe, seed, force, device=DEVICE.get())


def import_(source: str, out: Path, force: bool = False, *, world: str | None = None) -> Artifact:
    return run(stage("import"), {}, out, RecipeChoice(), 0, force, origin=source, of_world=world)


def prepared_import(source: str) -> Stage:
    """An import that is ready to run."""
    return prepare(stage("import"), {}, RecipeChoice(), origin=source)


def prepared(name: str, refs: dict[str, str | Path], recipe: Recipe) -> Stage:
    """A stage that is ready to run."""
    return prepare(stage(name), refs, recipe, device=DEVICE.get())


def plan(name: str, refs: dict[str, str | Path], out: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """What `--plan` prints."""
    return describe(prepare(stage(name), refs, recipe, **options), out)


def generate(
    artifact: str | Path,
    prompts: list[str],
    out: Path,
    seed: int = 0,
    *,
    seeds: list[int] | None = None,
    size_px: int | str | Size | None = None,
    contact_sheet: bool = False,
    batch: int = 8,
    preview: bool = False,
    engine: str = "auto",
    memory: str | None = None,
    device: str = "cpu",
    **request: Any,
) -> list[Path]:
    """`flashgen generate`: prompt i from seed + i, or every prompt from each of `seeds`; `request` are further fields of Request."""
    from flashgen.stages.generate import generate as draw
    from flashgen.stages.request import Request, option_size

    pairs = [(p, s) for p in prompts for s in seeds] if seeds else [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    size = option_size(None if size_px is None else str(size_px))
    asked = Request([prompt for prompt, _ in pairs], [number for _, number in pairs], size=size, **request)
    columns = len(seeds or []) if contact_sheet else None
    return draw(
        open_input(artifact), asked, out, batch=batch, grid_columns=columns, preview=preview, engine=engine, memory=memory, device=device
    )


def bench(
    artifacts: Sequence[str | Path], out: Path | None, recipe: Recipe, seed: int = 0, per_task: int | None = None, **options: Any
) -> dict[str, Any]:
    """`flashgen bench`; `options` are further arguments of `stages.bench.bench`."""
    from flashgen.stages import bench as module

    refs = [str(ref) for ref in artifacts]
    return module.bench(refs, module.open_all(refs), out, recipe, seed, per_task, **options)


def saved(folder: Path) -> dict[str, Any]:
    """Full tensors by name of the newest checkpoint of a training that one process ran."""
    from safetensors.torch import load_file

    from flashgen.training.checkpoint import checkpoints

    return {name: tensor for file in checkpoints(folder)[-1].glob("*.safetensors") for name, tensor in load_file(file).items()}
