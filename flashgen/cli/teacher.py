"""flashgen teacher train | import | random"""

from __future__ import annotations

from typing import Annotated

import typer

from flashgen.cli.options import STAGE, Options, command
from flashgen.cli.run import run_stage

WORLD = typer.Option("--world", metavar="NAME", help="world whose prompts and judge it is for, as `shapes`; default: none")

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help="Make, import or fabricate a teacher.")


@app.command("train")
@command(*STAGE)
def train(options: Options) -> None:
    """Train the embedded world's teacher from nothing."""
    run_stage(options, "teacher.Train", {})


@app.command("import")
@command("out", "plan", "force")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a diffusers folder, or hf:OWNER/NAME")],
    options: Options,
    world: Annotated[str | None, WORLD] = None,
) -> None:
    """Bring in a diffusers folder or a hub repository, checked, copied and digested."""
    run_stage(options, "teacher.Import", {}, origin=source, of_world=world)


@app.command("random")
@command("out", "seed", "plan", "force")
def random(
    like: Annotated[str, typer.Option("--like", metavar="sd35-medium|sd35-large|sd3-medium|shapes|tiny", help="architecture")],
    options: Options,
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", min=1, help="at most, per network")] = None,
    world: Annotated[str | None, WORLD] = None,
) -> None:
    """Right shapes, seeded random weights: for tests at scale without a hub."""
    run_stage(options, "teacher.Random", {}, like=like, layers=layers, of_world=world)
