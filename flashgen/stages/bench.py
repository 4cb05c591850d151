"""bench: latency, memory, size and quality of artifacts, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.metrics.latency import Job, measure_apart
from flashgen.metrics.report import contact_sheet, print_table, short_names
from flashgen.progress import say, track
from flashgen.recipe.schema import Recipe
from flashgen.stages.inputs import open_input, sampler_of, world_of
from flashgen.stages.prompts import own_prompts

if TYPE_CHECKING:
    from flashgen.worlds.base import World

SHEET_COLUMNS = 8


def bench(
    artifacts: list[str],
    opened: list[Artifact],
    out: Path | None,
    recipe: Recipe,
    seed: int,
    per_task: int | None,
    engine: str,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure `opened`, named `artifacts`, in the order given; {"results": [...]} as docs/commands.md describes it.

    Prompt i is drawn from seed + i, the same for every artifact: `per_task` prompts per task of the artifacts' world, whose judge scores
    them, or the recipe's own prompts, which nothing judges. With `out`, bench.json and contact-sheet.png are written there.
    """
    for source in opened:
        sampler_of(source)
    count = recipe.bench.per_task if per_task is None else per_task
    world, prompts = prompts_for(opened, recipe, seed, count)
    if out is not None:
        _writable(out)
    seeds = [seed + i for i in range(len(prompts))]
    results, pictures = [], []
    columns = slice(None, None, max(1, len(prompts) // SHEET_COLUMNS))
    for ref, source in track(list(zip(artifacts, opened, strict=True)), "bench", total=len(opened)):
        job = Job(str(source.path), prompts, seeds, recipe.bench.warmup, recipe.bench.repeats, recipe.bench.batch, engine, device)
        with tempfile.TemporaryDirectory(prefix="flashgen-bench-") as folder:
            measured, images = measure_apart(job, Path(folder))
        scores: Any = "not judged" if world is None else {k: round(v, 4) for k, v in world.judge(images, prompts).scores.items()}
        quality = {"composition": scores}
        results.append({"artifact": str(ref), **measured, "size_mib": round(source.size_bytes() / 2**20, 3), "quality": quality})
        pictures.append(list(images[columns][:SHEET_COLUMNS]))
    print_table(results)
    if out is not None:
        settings = {"seed": seed, "per_task": count, **recipe.bench.model_dump(exclude={"per_task"})}
        (out / "bench.json").write_text(json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1) + "\n")
        contact_sheet(pictures, short_names(artifacts), out / "contact-sheet.png", prompts[columns][:SHEET_COLUMNS])
        say(f"written: {out / 'bench.json'}, {out / 'contact-sheet.png'}")
    return {"results": results}


def open_all(artifacts: list[str]) -> list[Artifact]:
    """The artifacts to measure. Raises UsageError when there are none."""
    if not artifacts:
        raise UsageError("nothing to measure; name one or more artifacts, as in: flashgen bench artifacts/student artifacts/device")
    return [open_input(ref) for ref in artifacts]


def prompts_for(opened: list[Artifact], recipe: Recipe, seed: int, per_task: int) -> tuple[World | None, list[str]]:
    """(judging world or None, prompts). Raises UsageError when the artifacts share no world and the recipe brings no prompts."""
    names = {world.name if (world := world_of(source)) else None for source in opened}
    world = world_of(opened[0]) if len(names) == 1 else None
    if world is not None and per_task < 1:
        raise UsageError(f"--per-task {per_task} is out of range; use 1 or more")
    if world is not None:
        return world, world.prompts(seed, per_task)
    if (own := own_prompts(recipe)) is not None:
        return None, own.validation
    outside = next(source.path for source in opened if world_of(source) is None)
    raise UsageError(
        f"{outside} belongs to no world that brings prompts and a judge; give a file with one prompt per line, --set prompts_file=FILE, or "
        "name a recipe that has one, --recipe NAME|FILE"
    )


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error


def machine() -> dict[str, Any]:
    """The machine that the numbers were measured on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
