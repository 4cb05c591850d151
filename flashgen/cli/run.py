"""What every command shares: errors to exit codes, time and memory, one result on stdout."""

from __future__ import annotations

import errno
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashgen.errors import FlashgenError, UsageError
from flashgen.processes import rank
from flashgen.progress import say
from flashgen.timing import peak_rss_mib

if TYPE_CHECKING:
    from flashgen.artifact.store import Artifact
    from flashgen.cli.options import Options
    from flashgen.recipe.schema import Recipe

EXTRAS = {"gguf": "gguf"}  # by what cannot be imported; everything else is in `train`


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turn exceptions into one sentence on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        say(message if code == 130 else f"error: {message}")
        raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, sentence for the user)"""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FlashgenError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; nothing half-written was published, the same command resumes"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return 5, f"no space left on the disk ({text}); free some, then the same command resumes"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 5, f"not enough memory ({text}); lower the batch (--set ...batch=), then the same command resumes"
    if isinstance(error, ImportError) and not (error.name or "").startswith("flashgen"):
        extra = EXTRAS.get(error.name or "", "train")
        return 5, f'this command needs {error.name or text}, which is not installed: pip install "flashgen[{extra}]"'
    if isinstance(error, OSError):
        return 5, f"{text}; check the path, its rights and the disk, then run the same command again"
    return 1, f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def recipe_of(options: Options) -> Recipe:
    from flashgen.recipe.load import load

    return load(options.recipe, options.set or [])


def emit(options: Options, text: str, record: Mapping[str, Any]) -> None:
    """The result, the only thing on stdout."""
    if rank() == 0:
        print(json.dumps(record) if options.json else text, flush=True)


def record_of(artifact: Artifact, stage: str, started: float, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "artifact": str(artifact.path),
        "stage": stage,
        "version": artifact.manifest.version,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_mib": peak_rss_mib(),
        "metrics": dict(metrics),
    }


def run_stage(options: Options, stage: str, inputs: Mapping[str, str], function: str = "run", **extra: Any) -> None:
    """Call `flashgen.stages.<stage>.<function>(*inputs, ...)` with the offered options and print the artifact it returns."""
    import importlib

    check_device(options)
    started = time.perf_counter()
    given: dict[str, Any] = {name: getattr(options, name) for name in ("out", "seed", "force") if name in options.offered}
    if "recipe" in options.offered:
        given["recipe"] = recipe_of(options)
    module = importlib.import_module(f"flashgen.stages.{stage}")
    if options.plan:
        planned = plan(stage, inputs, options.out, given.get("recipe"), **extra)
        print(json.dumps({"stage": stage, "seed": options.seed, **extra, **planned}, indent=None if options.json else 2))
        return
    artifact: Artifact = getattr(module, function)(*inputs.values(), **given, **extra)
    emit(options, str(artifact.path), record_of(artifact, artifact.manifest.stage, started, artifact.manifest.metrics))


def check_device(options: Options) -> None:
    """A device that flashgen cannot use is an error, never ignored."""
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"--device {options.device}: flashgen computes on the CPU only; leave the option out")


def plan(stage: str, inputs: Mapping[str, str], out: Path, recipe: Recipe | None, **extra: Any) -> dict[str, Any]:
    """What a run would read, write and need. Raises what the run itself would, for broken files and for what recipes cannot ask of them."""
    from flashgen.artifact.store import open_artifact, versions

    opened = {role: open_artifact(ref) for role, ref in inputs.items() if role != "source"}  # a source is no artifact yet
    needs: dict[str, Any] = dict.fromkeys(("memory", "memory_bytes", "machine_bytes", "disk_bytes", "forwards", "seconds"))
    source = next(iter(opened.values()), None)
    if source is not None and recipe is not None and (source.path / "transformer" / "config.json").is_file():
        from flashgen.stages import checks
        from flashgen.stages import plan as plans

        match stage:
            case "distill":
                if start := checks.check_distillation(source, recipe):
                    opened["start"] = start
            case "finetune":
                checks.check_finetuning(source, recipe)
            case "quantize":
                checks.check_quantizing(source, recipe)
            case "export":
                checks.check_exporting(source, recipe, **extra)
        found = plans.plan_of(stage, source, recipe, **extra)
        needs |= {
            "memory": {phase: {name: int(size) for name, size in parts.items()} for phase, parts in found.memory.items()},
            "memory_bytes": int(found.peak),
            "machine_bytes": plans.memory_bytes(),
            "disk_bytes": int(found.disk),
            "forwards": found.forwards,
            "seconds": plans.seconds(found),
        }
    described = [
        {"role": role, "path": str(a.path), "kind": a.manifest.kind, "digest": a.manifest.digest, "bytes": a.size_bytes()}
        for role, a in opened.items()
    ]
    return {
        "inputs": described or [{"role": role, "path": ref} for role, ref in inputs.items()],
        "out": str(out),
        "versions": [path.name for path in versions(out)],
        **needs,
        "recipe": recipe.model_dump(mode="json") if recipe else None,
    }
