"""The output of `--plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flashgen.artifact.store import versions
from flashgen.stages.base import Stage
from flashgen.stages.planning import Plan


def describe(stage: Stage, out: Path) -> dict[str, Any]:
    """Inputs, outputs and needs of a prepared run as JSON data (`--plan`). Starts nothing."""
    plan = best_plan(stage)
    nothing = dict.fromkeys(("memory", "memory_bytes", "machine_bytes", "disk_bytes", "forwards", "seconds"))
    inputs = [
        {"role": role, "path": str(a.path), "kind": a.manifest.kind, "digest": a.manifest.digest, "bytes": a.size_bytes()}
        for role, a in stage.inputs.items()
    ]
    return {
        "inputs": inputs,
        "out": str(out),
        "versions": [path.name for path in versions(out)],
        **(nothing if plan is None else plan.describe()),
        **({} if stage.on is None or plan is None else _launched(stage, plan)),
        "recipe": stage.recipe.model_dump(mode="json") if stage.needs_recipe else None,
    }


def _launched(stage: Stage, plan: Plan) -> dict[str, Any]:
    """How the processes of a planned machine are started, or why the run does not fit there."""
    sharing = "--config_file recipes/accelerate/fsdp2.yaml" if plan.machine.sharded else "--multi_gpu"
    several = f"accelerate launch {sharing} --num_processes {plan.machine.processes} -m flashgen {stage.name} ..."
    launch = several if plan.machine.processes > 1 else f"flashgen {stage.name} ..."
    return {"launch": launch} if plan.fits else {"lacking": plan.lacking(stage.name)}


def best_plan(stage: Stage) -> Plan | None:
    """The stage's plan. On a named machine processes share batches only, or the networks too (FSDP2) where nothing else fits."""
    plan = stage.plan()
    if plan is None or plan.fits or stage.on is None or stage.on.processes == 1 or not stage.shards:
        return plan
    sharded = replace(stage, on=replace(stage.on, sharded=True))
    other = sharded.plan()
    return plan if other is None or (not other.fits and plan.peak <= other.peak) else other
