"""bench: latency, memory, size and quality of artifacts, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from flashgen.artifact.store import open_artifact
from flashgen.errors import UsageError
from flashgen.metrics.latency import Job, measure_apart
from flashgen.metrics.report import contact_sheet, print_table, short_names
from flashgen.progress import say, track
from flashgen.recipe.schema import Recipe
from flashgen.shapes.scene import prompt_set
from flashgen.shapes.verify import composition
from flashgen.stages.generate import sampler_of

SHEET_COLUMNS = 8


def run(artifacts: list[str], out: Path | None, recipe: Recipe, seed: int, per_task: int | None = None) -> dict[str, Any]:
    """Measure `artifacts` in the order given; {"results": [...]} as docs/commands.md has it.

    Composition is judged on `per_task` prompts of each of the six tasks (default: the recipe's), prompt i drawn from seed + i,
    the same for every artifact. With `out`, bench.json and contact-sheet.png are written there.
    """
    if not artifacts:
        raise UsageError("nothing to measure; name one or more artifacts, as in: flashgen bench artifacts/student artifacts/device")
    opened = [open_artifact(ref) for ref in artifacts]
    for source in opened:
        sampler_of(source)
    if out is not None:
        _make(out)
    count = recipe.bench.per_task if per_task is None else per_task
    if count < 1:
        raise UsageError(f"--per-task {count} is out of range; use 1 or more")
    requests = prompt_set(seed, count)
    prompts = [r.caption() for r in requests]
    seeds = [seed + i for i in range(len(prompts))]
    results, pictures = [], []
    for ref, source in track(list(zip(artifacts, opened, strict=True)), "bench", total=len(opened)):
        job = Job(str(source.path), prompts, seeds, recipe.bench.warmup, recipe.bench.repeats, recipe.bench.batch)
        with tempfile.TemporaryDirectory(prefix="flashgen-bench-") as folder:
            found, images = measure_apart(job, Path(folder))
        quality = {"composition": {k: round(v, 4) for k, v in composition(list(images), requests).items()}}
        results.append({"artifact": str(ref), **found, "size_mib": round(source.size_bytes() / 2**20, 3), "quality": quality})
        every = max(1, len(prompts) // SHEET_COLUMNS)
        pictures.append(list(images[::every][:SHEET_COLUMNS]))
    print_table(results)
    if out is not None:
        settings = {"seed": seed, "per_task": count, **recipe.bench.model_dump(exclude={"per_task"})}
        (out / "bench.json").write_text(json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1) + "\n")
        contact_sheet(pictures, short_names([str(ref) for ref in artifacts]), out / "contact-sheet.png", prompts[::every][:SHEET_COLUMNS])
        say(f"written: {out / 'bench.json'}, {out / 'contact-sheet.png'}")
    return {"results": results}


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; name a folder that can be written to") from error


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
