"""Code shared by all commands: exit codes, time and memory, one result on stdout."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from flashgen.errors import FlashgenError, MachineError, UsageError, is_disk_full, is_out_of_memory, one_line
from flashgen.progress import printable, say
from flashgen.runtime.memory import peak_rss_mib
from flashgen.runtime.processes import rank, speaks_for_itself, world_size

if TYPE_CHECKING:
    from flashgen.artifact.store import Artifact
    from flashgen.cli.options import Options
    from flashgen.stages.inputs import RecipeChoice

EXTRAS = {
    "gguf": "gguf",
    "openvino": "openvino",
    "bitsandbytes": "nf4",
    "pyarrow": "data",
    "datasets": "data",
    "lpips": "lpips",
    "starlette": "arena",
    "uvicorn": "arena",
}  # extra by module; all others are in `train`


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside, so that a batch system's request to end cleans up as an interrupt does.

    A launcher that ends its processes does not wait for them to clean up: with several processes SIGTERM ends this one at once.
    """

    def end(*_: object) -> None:
        raise Terminated

    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turn an exception inside into one sentence on stderr and an exit code."""
    try:
        with terminable():
            yield
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        say(message if isinstance(error, KeyboardInterrupt) else f"error: {message}")
        if speaks_for_itself(error):
            print(printable(f"error in process {rank()}: {message}"), file=sys.stderr, flush=True)
        raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, sentence for the user) of an exception."""
    text = one_line(error)
    if isinstance(error, FlashgenError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, "interrupted; nothing half-written was published, the same command resumes"
    if is_disk_full(error):
        return 5, f"no space left on the disk ({text}); free some, then the same command resumes"
    if is_out_of_memory(error):
        return 5, f"not enough memory ({text}); lower the batch (--set ...batch=), then the same command resumes"
    if isinstance(error, ImportError) and not (error.name or "").startswith("flashgen"):
        extra = EXTRAS.get(error.name or "", "train")
        return 5, f'this command needs {error.name or text}, which is not installed: pip install "flashgen[{extra}]"'
    if isinstance(error, OSError):
        return 5, f"{text}; check the path, its rights and the disk, then run the same command again"
    return 1, f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def choice_of(options: Options) -> RecipeChoice:
    """The recipe that the options name."""
    from flashgen.stages.inputs import RecipeChoice

    judge = [f"judge={json.dumps(options.judge)}"] if options.judge is not None else []
    return RecipeChoice(options.recipe, (*(options.set or ()), *judge))


def emit(options: Options, text: str, record: Mapping[str, Any]) -> None:
    """Print the result, the only thing on stdout, in the first process."""
    if rank() == 0:
        print(json.dumps(record) if options.json else printable(text), flush=True)


def record_of(artifact: Artifact, stage: str, started: float, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object that a command prints with --json."""
    return {
        "artifact": str(artifact.path),
        "stage": stage,
        "version": artifact.manifest.version,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_mib": peak_rss_mib(),
        "metrics": dict(metrics),
    }


def run_stage(options: Options, stage: str, refs: Mapping[str, str], **fields: Any) -> None:
    """Run stage MODULE.CLASS of `flashgen.stages` on the inputs `refs`, or print its plan; print the artifact that it returns.

    Raises MachineError after printing the plan for a machine that is too small for it.
    """
    started = time.perf_counter()
    if options.on and not options.plan:
        raise UsageError(f"--on {options.on} names a machine to plan for, and nothing can start there from here; add --plan")
    from flashgen.runtime.machines import machine_named
    from flashgen.stages.base import execute, prepare
    from flashgen.stages.describe import describe

    module, _, name = stage.partition(".")
    kind = getattr(importlib.import_module(f"flashgen.stages.{module}"), name)
    on = machine_named(options.on) if options.on else None
    prepared = prepare(kind, refs, choice_of(options), options.seed, device=options.device, on=on, **fields)
    if options.plan:
        planned = {"stage": kind.name, "seed": options.seed, **fields, **describe(prepared, options.out)}
        print(json.dumps(planned, indent=None if options.json else 2))
        if lacking := planned.get("lacking"):
            raise MachineError(lacking)
        return
    artifact = execute(prepared, options.out, options.force)
    emit(options, str(artifact.path), record_of(artifact, artifact.manifest.stage, started, artifact.manifest.metrics))
