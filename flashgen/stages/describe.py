"""What `--plan` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashgen.artifact.store import versions
from flashgen.stages.base import Stage


def describe(stage: Stage, out: Path) -> dict[str, Any]:
    """What a prepared run would read, write and need, as JSON data (`--plan`). Starts nothing."""
    plan = stage.plan()
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
        "recipe": stage.recipe.model_dump(mode="json") if stage.needs_recipe else None,
    }
