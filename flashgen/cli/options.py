"""The common options, spelt once. `@command("out", "seed", ...)` gives a command those it names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from flashgen.cli.run import exit_codes
from flashgen.runtime.environment import check_environment


@dataclass(frozen=True, kw_only=True)
class Options:
    """Values of the common options; options that a command does not offer keep their default."""

    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="artifact folder; a new version appears in it")] = Path()
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME|FILE", help="numbers of the run; default: the world's")] = None
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.SUB=VALUE", help="change one number; repeatable")] = None
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="SPEC", help="what scores pictures, as clip:WEIGHTS or command:PROGRAM"),
    ] = None
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="seed of all randomness")] = 0
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps", help="where to compute")] = "auto"
    plan: Annotated[bool, typer.Option("--plan", help="print recipe, inputs, output and estimates; start nothing")] = False
    on: Annotated[str | None, typer.Option("--on", metavar="8x80GB|rtx4090", help="with --plan: a machine that is not this one")] = None
    force: Annotated[bool, typer.Option("--force", help="make a new version even if the latest is up to date")] = False
    json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False
    offered: tuple[str, ...] = ()


STAGE = ("out", "recipe", "set", "seed", "device", "plan", "force")


def command(*offered: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `function(..., options)` a command with the named common options (always with --json and --debug).

    Errors leave it as exit codes. `out` is required where it is offered.
    """
    offered = (*offered, "json", "debug")
    hints = get_type_hints(Options, include_extras=True)
    defaults = {f.name: Parameter.empty if f.name == "out" else f.default for f in fields(Options) if f.name in offered}
    shared = [Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[name]) for name, default in defaults.items()]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters if p.name != "options"]

        @functools.wraps(function)
        def wrapper(**values: Any) -> None:
            options = Options(**{name: values.pop(name) for name in offered}, offered=offered)
            with exit_codes(options.debug):
                check_environment()
                function(**values, options=options)

        wrapper.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        return wrapper

    return decorate
