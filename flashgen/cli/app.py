"""The `flashgen` command. Importing it must stay cheap: heavy imports live inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flashgen import __version__
from flashgen.cli import arena, teacher
from flashgen.cli.bench import bench
from flashgen.cli.distill import distill
from flashgen.cli.export import export
from flashgen.cli.finetune import finetune
from flashgen.cli.generate import generate
from flashgen.cli.quantize import quantize
from flashgen.cli.restructure_encoder import restructure_encoder
from flashgen.cli.run import explain
from flashgen.cli.show import show
from flashgen.progress import say
from flashgen.runtime.memory import cpu_count

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    """From a rectified-flow teacher to a few-step INT4 artifact. Exit codes: 0 done, 2 usage, 3 artifact, 4 numerics, 5 environment."""


app.add_typer(teacher.app, name="teacher")
for name, function in (
    ("distill", distill),
    ("finetune", finetune),
    ("restructure-encoder", restructure_encoder),
    ("quantize", quantize),
    ("export", export),
    ("generate", generate),
    ("bench", bench),
    ("show", show),
):
    app.command(name)(function)
app.add_typer(arena.app, name="arena")


def main() -> None:
    """Run the command line."""
    # Progress bars and notices of the libraries would hide ours; a variable that the user has set keeps its value.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not os.environ.get("OMP_NUM_THREADS", "").strip():  # OpenMP, and so torch, knows the affinity but no quota of a container
        os.environ["OMP_NUM_THREADS"] = str(cpu_count())
    try:
        app(prog_name="flashgen")
    except KeyboardInterrupt as error:  # before a command begins
        code, message = explain(error)
        say(message)
        sys.exit(code)
