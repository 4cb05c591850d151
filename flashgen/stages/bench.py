"""bench: latency, memory, size and quality of artifacts, each measured in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashgen import errors
from flashgen.artifact.files import write_whole
from flashgen.artifact.store import Artifact
from flashgen.errors import NumericsError, UsageError, disk_named
from flashgen.judges.base import Judge
from flashgen.judges.world import WorldJudge
from flashgen.metrics.baseline import VERSION, check_comparable, compare, read_baseline
from flashgen.metrics.latency import Pictures, Row, measure, summarise
from flashgen.metrics.machine import NoiseMeter, fingerprint
from flashgen.metrics.report import contact_sheet, print_table, row_labels
from flashgen.metrics.worker import Job
from flashgen.pixels import Size
from flashgen.progress import say, warn
from flashgen.recipe.schema import Recipe
from flashgen.stages.bench_files import bytes_by_component, clear_pictures, lineage, output, scratch, write_pictures
from flashgen.stages.bench_quality import NOT_JUDGED, compare_pictures, judge_rows
from flashgen.stages.bench_rows import Comparison, Grid, PlannedRow, plan_rows
from flashgen.stages.inputs import open_input, world_of
from flashgen.stages.judging import judge_of
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
    grid: Grid | None = None,
    comparison: Comparison | None = None,
    *,
    device: str = "auto",
    judges: Sequence[Judge] | None = None,
    command: str = "flashgen bench",
) -> dict[str, Any]:
    """Measure `opened`, named `artifacts`, in the order given; the report, as docs/commands.md describes bench.json.

    Prompt i is drawn from seed + i, the same for every row: `per_task` prompts per task of the artifacts' world, or the recipe's own
    prompts. `judges` (None: the world's, where there is one) score the pictures. With `out`, the report and pictures are written there.
    A row that fails is in `failed`, with its error; raises that error when no row is left. `baseline` says what got worse.
    `check` turns both into errors.
    """
    grid, comparison = grid or Grid(), comparison or Comparison()
    rows = plan_rows(artifacts, opened, grid, device)
    count = recipe.bench.per_task if per_task is None else per_task
    world, texts = prompts_for(opened, recipe, seed, count)
    tasks = [None] * len(texts) if world is None else [task for task in world.tasks for _ in range(count)]
    prompts = [{"prompt": text, "seed": seed + i, "task": task} for i, (text, task) in enumerate(zip(texts, tasks, strict=True))]
    if judges is None:
        judges = [] if world is None else [WorldJudge(world)]
    settings = {"seed": seed, "per_task": count, **recipe.bench.model_dump(exclude={"per_task"}), **asdict(grid)}
    report: dict[str, Any] = {"version": VERSION, "machine": fingerprint(), "command": command, "settings": settings, "prompts": prompts}
    baseline = None if comparison.baseline is None else read_baseline(comparison.baseline)
    if comparison.baseline is not None and baseline is not None:
        check_comparable(comparison.baseline, baseline, report, {row.name for row in rows})
    references = reference_rows(rows, comparison.reference)
    with output(out, comparison.baseline):
        with scratch() as folder:
            done, drawn = _measure(rows, report, recipe, folder)
        if out is not None:  # the pictures stay mapped, and a kill from here on leaves nothing in the temporary folder
            with disk_named(out):
                _write_drawings(out, report, done, drawn)
                _write(out, report)  # so that a judge that fails loses no measurement
        judge_rows(report, judges, drawn)
        compare_pictures(report, done, references, drawn, comparison)
        if baseline is not None:
            worse, missing = compare(report["results"], baseline, comparison.tolerance)
            report["baseline"] = {"file": str(comparison.baseline), "tolerance": comparison.tolerance, "worse": worse, "missing": missing}
        if out is not None:
            with disk_named(out):
                _write(out, report)
                _write_report(out)
    _print(report, out)
    return report


def _measure(rows: Sequence[PlannedRow], report: dict[str, Any], recipe: Recipe, folder: Path) -> tuple[list[PlannedRow], list[Pictures]]:
    """Fill in `results`, `failed` and the machine's noise; (measured rows, their pictures, mapped from files in `folder`)."""
    noise, prompts = NoiseMeter(), report["prompts"]
    measured = [Row(row.job, row.source.size_bytes(), folder / str(i)) for i, row in enumerate(rows)]
    pictures = measure(measured, [p["prompt"] for p in prompts], [p["seed"] for p in prompts], recipe.bench, noise)
    pairs = [*zip(rows, measured, strict=True)]
    done = [(row, m) for row, m in pairs if m.error is None]
    if not done and (error := measured[0].error):
        raise error
    report["results"] = [result_of(row, m) for row, m in done]
    report["failed"] = [_failure(row, m) for row, m in pairs if m.error]
    precision = recipe.bench.precision
    report["machine"]["noise"] = noise.report([row.name for row, m in done if not m.is_settled(precision)], precision)
    return [row for row, _ in done], [pictures[m.pictures_key] for _, m in done]


def _print(report: Mapping[str, Any], out: Path | None) -> None:
    """Print the table on stderr, and what a reader must know beside it."""
    print_table(report["results"])
    for failure in report["failed"]:
        warn(f"{failure['name']} ({failure['engine']}) was not measured: {failure['message']}")
    noise = report["machine"]["noise"]
    if noise["noisy"]:
        warn(f"this machine is too noisy for exact latencies: {'; '.join(noise['why'])}; end other work, then measure again")
    if out is not None:
        say(f"written: {out / 'bench.json'}, {out / 'report.html'}, {out / 'contact-sheet.png'}")


def check(report: Mapping[str, Any]) -> None:
    """Raises the error of the first row that failed, else NumericsError naming every row and number that is worse than in the baseline."""
    for failure in report["failed"]:
        raise getattr(errors, failure["error"])(failure["message"])
    baseline = report.get("baseline", {"worse": [], "missing": []})
    for what in baseline["missing"]:
        warn(f"--baseline {baseline['file']} does not have {what}, which is not compared")
    if baseline["worse"]:
        noisy = " (this machine is noisy, see above)" if report["machine"]["noise"]["noisy"] else ""
        raise NumericsError(
            f"worse than {baseline['file']} beyond --tolerance {baseline['tolerance']:g}{noisy}: {'; '.join(baseline['worse'])}. "
            "Mend it, or accept it as a new baseline with --out DIR"
        )


def judges_of(opened: Sequence[Artifact], recipe: Recipe, specs: Sequence[str], device: str = "auto") -> list[Judge]:
    """The judges that `specs` name, or the recipe; without both that of the world which all artifacts share. `teacher` is the first's."""
    source, shared = opened[0], len({world.name if (world := world_of(artifact)) else None for artifact in opened}) == 1
    judges = []
    for spec in (*specs,) or (recipe.judge,):
        judge = judge_of(source, world_of(source), recipe.model_copy(update={"judge": spec}), device)
        if judge is not None and (shared or not isinstance(judge, WorldJudge)):
            judges.append(judge)
    return judges


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


def reference_rows(rows: Sequence[PlannedRow], reference: str | None) -> dict[Size, Job]:
    """The job by size of the artifact called `reference`, with whose pictures all others are compared; empty without a reference.

    Raises UsageError when `reference` is none of the artifacts, or is drawn at no size of another one.
    """
    if reference is None:
        return {}
    by_size = {row.size: row.job for row in reversed(rows) if row.ref == reference}
    if not by_size:
        raise UsageError(f"--reference {reference} is none of the artifacts; name it too, as in: flashgen bench {reference} OTHER")
    if other := next((row for row in rows if row.size not in by_size), None):
        sizes = ", ".join(map(str, by_size))
        raise UsageError(f"--reference {reference} is drawn at {sizes} px and {other.name} at {other.size}: give one --size")
    return by_size


def result_of(row: PlannedRow, measured: Row) -> dict[str, Any]:
    """The entry of `results` for a row, before its pictures are judged."""
    latency, interval = summarise(measured)
    last = measured.rounds[-1]
    device = {"peak_device_mib": last["peak_device_mib"]} if "peak_device_mib" in last else {}
    return {
        "artifact": row.ref,
        "name": row.name,
        **{key: last[key] for key in ("engine", "device", "threads")},
        "size_px": f"{row.size.width}x{row.size.height}",
        "steps": row.steps,
        "size_mib": round(row.source.size_bytes() / 2**20, 3),
        "bytes": bytes_by_component(row.source),
        "lineage": lineage(row.source),
        "latency_s": latency,
        "latency_interval_s": interval,
        "pictures_measured": len(measured.rounds),
        "peak_rss_mib": last["peak_rss_mib"],
        "peak_phase_mib": last["peak_phase_mib"],
        **device,
        "quality": dict(NOT_JUDGED),
        "quality_interval": {},
        "quality_of": {},
        "values": {},
        "fidelity": None,
        "pictures": None,
    }


def _failure(row: PlannedRow, measured: Row) -> dict[str, Any]:
    about = {"artifact": row.ref, "name": row.name, "engine": row.job.engine, "threads": row.job.threads}
    about |= {"size_px": f"{row.size.width}x{row.size.height}", "steps": row.steps}
    return about | {"error": type(measured.error).__name__, "message": str(measured.error)}


def _write_drawings(out: Path, report: Mapping[str, Any], rows: Sequence[PlannedRow], drawn: Sequence[Pictures]) -> None:
    """Write the pictures and their contact sheet, and name the folders in `results`."""
    clear_pictures(out)
    texts, seeds = ([p[key] for p in report["prompts"]] for key in ("prompt", "seed"))
    folders: dict[int, str] = {}
    for row, result, images in zip(rows, report["results"], drawn, strict=True):
        if id(images) not in folders:
            folders[id(images)] = write_pictures(out, len(folders), row, images, texts, seeds)
        result["pictures"] = folders[id(images)]
    columns = slice(None, None, max(1, len(texts) // SHEET_COLUMNS))
    labels = row_labels(report["results"])
    shown = {result["pictures"]: i for i, result in reversed([*enumerate(report["results"])])}
    sheet = [[np.asarray(image) for image in drawn[i][columns][:SHEET_COLUMNS]] for i in sorted(shown.values())]
    contact_sheet(sheet, [labels[i] for i in sorted(shown.values())], out / "contact-sheet.png", texts[columns][:SHEET_COLUMNS])


def _write(out: Path, report: Mapping[str, Any]) -> None:
    write_whole(out / "bench.json", (json.dumps(report, indent=1) + "\n").encode())


def _write_report(out: Path) -> None:
    from flashgen.report import write_report

    write_report(out)
