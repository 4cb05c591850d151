"""flashgen arena build | serve | page | collect | analyse"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashgen.cli.options import Options, command
from flashgen.cli.run import emit

STUDY = typer.Argument(metavar="STUDY", help="folder of a study")

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help="Ask people which pictures they prefer, blindly."
)


@app.command("build")
@command("set")
def build(
    bench: Annotated[Path, typer.Argument(metavar="BENCH", help="folder that `flashgen bench ARTIFACT... --out BENCH` wrote")],
    options: Options,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STUDY", help="folder of the study")],
    judges: Annotated[bool, typer.Option("--judges", help="the bench's judges vote, too, ranked apart from people")] = False,
    preset: Annotated[str | None, typer.Option("--preset", metavar="NAME", help="sd35-flash: the sizes of the paper's study")] = None,
) -> None:
    """Build a study from the pictures of a bench. --set changes one of its settings, as --set per_rater=20."""
    from flashgen.arena import study, votes
    from flashgen.errors import UsageError
    from flashgen.recipe.text import parse

    values = {}
    for setting in options.set or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write NAME=VALUE, as in --set per_rater=20")
        try:
            values[name] = parse(value)
        except ValueError as error:
            raise UsageError(f"--set {setting}: the value is {error}") from error
    made = study.build(bench, out, study.settings_of(values, preset))
    by_judges = votes.bench_votes(study.Study(made), bench) if judges else 0
    emit(options, str(made), {"study": str(made), "votes_of_judges": by_judges})


@app.command("serve")
@command()
def serve(
    study: Annotated[Path, STUDY],
    options: Options,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="0.0.0.0: phones in the same network, too")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: a free one")] = 8765,
) -> None:
    """Serve a study until Ctrl-C; needs the extra `arena`."""
    from flashgen.arena import server

    server.serve(study, host, port)


@app.command("page")
@command()
def page(
    study: Annotated[Path, STUDY],
    options: Options,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the page, for one rater")],
) -> None:
    """Write one rater's page as a file that needs no server; `collect` takes the votes that it saves."""
    from flashgen.arena import static

    made = static.export(study, out)
    emit(options, str(made), {"page": str(made)})


@app.command("collect")
@command()
def collect(
    study: Annotated[Path, STUDY],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="files of votes that pages saved")],
    options: Options,
) -> None:
    """Add the votes of pages that were handed out."""
    from flashgen.arena import static

    added = static.collect(study, files)
    emit(options, str(added), {"study": str(study), "votes": added})


@app.command("analyse")
@command("seed")
def analyse(
    study: Annotated[Path, STUDY],
    options: Options,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="count raters who failed the gold pairs, too")] = False,
    precision: Annotated[float, typer.Option("--precision", metavar="ELO", min=1, help="wanted, for the votes still needed")] = 25.0,
) -> None:
    """Rank the artifacts of a study by its votes: Elo with intervals, raters' consistency, votes still needed."""
    from flashgen.arena import analysis

    result = analysis.analyse(study, keep_failed, precision, seed=options.seed)
    emit(options, str(study / "analysis.json"), result)
