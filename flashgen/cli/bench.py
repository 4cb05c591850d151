"""flashgen bench"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import choice_of, emit
from flashgen.errors import UsageError
from flashgen.progress import say


@command("recipe", "set", "seed", "device")
def bench(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT...", help="any artifacts; `shapes` is the embedded teacher")],
    options: Options,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="folder for report, numbers and pictures")] = None,
    per_task: Annotated[int | None, typer.Option("--per-task", metavar="N", min=1, help="prompts per task")] = None,
    engine: Annotated[list[str] | None, typer.Option("--engine", metavar="NAME[:DEVICE]", help="of exported ones; repeatable")] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", metavar="N", min=1, help="of the engine; repeatable")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", metavar="PX|WxH", help="default: as trained; repeatable")] = None,
    steps: Annotated[list[int] | None, typer.Option("--steps", metavar="N", min=1, help="default: as trained; repeatable")] = None,
    reference: Annotated[str | None, typer.Option("--reference", metavar="ARTIFACT", help="compare pictures with this one's")] = None,
    judge: Annotated[list[str] | None, typer.Option("--judge", metavar="SPEC", help="what scores pictures; repeatable")] = None,
    arena: Annotated[Path | None, typer.Option("--arena", metavar="STUDY", help="build a blind preference test, too")] = None,
    baseline: Annotated[Path | None, typer.Option("--baseline", metavar="FILE", help="exit 4 if worse than this bench.json")] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", metavar="SHARE", min=0, help="of what --baseline allows")] = 0.1,
) -> None:
    """Measure latency, memory, size and quality."""
    from flashgen.stages import bench as stage
    from flashgen.stages.bench_rows import Comparison, Grid

    if arena is not None and out is None:
        raise UsageError("--arena takes the pictures of the bench; add --out DIR")
    opened = stage.open_all(artifacts)
    recipe = choice_of(options).resolve(opened[0])
    grid = Grid(engine or (), threads or (), size or (), steps or ())
    judges = stage.judges_of(opened, recipe, judge or (), options.device)
    compared = Comparison(reference, baseline, tolerance, recipe.bench.lpips)
    report = stage.bench(
        artifacts, opened, out, recipe, options.seed, per_task, grid,
        compared, device=options.device, judges=judges, command=shlex.join(["flashgen", *sys.argv[1:]]),
    )  # fmt: skip
    if options.json or out:
        emit(options, str(out), report)
    if arena is not None and out is not None:
        from flashgen.arena import study

        study.build(out, arena, study.Settings())
        say(f"serve it with: flashgen arena serve {arena}")
    stage.check(report)
