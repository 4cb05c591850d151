"""What a stage will need: memory by phase and component, disk, forward passes and time.

Weights are counted tensor by tensor. Activations follow from the shapes and from the family's measured `costs`; docs/fullsize.md compares
the sums with measurements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashgen.artifact.draft import cache_folder
from flashgen.artifact.files import check_disk, disk_bytes
from flashgen.errors import MachineError
from flashgen.models.footprint import Footprint, Parts
from flashgen.recipe.schema import BenchRecipe
from flashgen.runtime.memory import total_bytes

CALIBRATION_S = 3.0  # seconds of measuring per type of number


@dataclass
class Plan:
    """Needs of one run. Numbers are bytes, forward passes of the transformer at batch 1, and multiply-adds by type of number."""

    memory: dict[str, Parts]  # by phase, then by component
    disk: float
    forwards: int = 0
    work: Mapping[str, float] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)  # by phase: settings that lower its memory
    cached: float = 0  # bytes of `disk` that other runs can use: embeddings and trajectories

    @property
    def peak(self) -> float:
        """Bytes of memory in the largest phase."""
        return max(sum(parts.values()) for parts in self.memory.values())

    def add_validation(self, footprint: Footprint, bench: BenchRecipe, pictures: int) -> None:
        """Add the phase that draws `pictures` with the result, if there are any."""
        if not pictures:
            return
        one, batch = footprint.forward(), min(bench.batch, pictures)
        networks = {name: 4.0 * footprint.parts[name].count for name in ("transformer", "vae")}
        activations = {"activations": 4.0 * batch * one.hidden * footprint.family.costs.running}
        self.memory["validate"] = footprint.embedding(batch)[0] | networks | activations
        self.advice["validate"] = f"validation draws {batch} pictures together: --set bench.batch=1, or none with --set bench.per_task=0"

    def check(self, stage: str, out: Path, work: Path, device_bytes: int | None = None) -> None:
        """Raises MachineError, before any work, when memory or disk are too small; the message says which setting lowers the need.

        Files that an earlier run has left in `work` or in the cache of `out` need no disk again. `device_bytes` is the memory of the
        accelerator that the stage computes on; None: this machine's counts.
        """
        check_disk(out, int(self.disk - min(self.cached, disk_bytes(cache_folder(out)))) - disk_bytes(work))
        free = device_bytes or total_bytes()
        if free is None or self.peak <= free:
            return
        phase, parts = max(self.memory.items(), key=lambda item: sum(item[1].values()))
        largest = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sorted(parts.items(), key=lambda item: -item[1])[:3])
        needs = f"{stage} needs {self.peak / 2**30:.1f} GiB of memory in its phase '{phase}' (GiB: {largest})"
        raise MachineError(f"{needs}, {free / 2**30:.1f} are there; {self.advice.get(phase, 'run it where more memory is free')}")

    def describe(self) -> dict[str, Any]:
        """The plan as JSON data, for `--plan`."""
        return {
            "memory": {phase: {name: int(size) for name, size in parts.items()} for phase, parts in self.memory.items()},
            "memory_bytes": int(self.peak),
            "machine_bytes": total_bytes(),
            "disk_bytes": int(self.disk),
            "forwards": self.forwards,
            "seconds": self.seconds(),
        }

    def seconds(self) -> float:
        """Estimated time, from a measurement of matrix products and of rounding on this machine (`CALIBRATION_S` each)."""
        return round(sum(amount * _seconds_each(number) for number, amount in self.work.items() if amount), 1)


def _seconds_each(number: str) -> float:
    """Seconds per multiply-add in bf16 or fp32, or per weight for number "rounded"."""
    import torch

    from flashgen.quant.rounding import quantize_groups

    dtype = torch.bfloat16 if number == "bf16" else torch.float32
    x, weight, done = torch.randn(512, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype), 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < CALIBRATION_S:
        if number == "rounded":
            quantize_groups(weight, 4, 128, False)
        else:
            torch.nn.functional.linear(x, weight)
        done += weight.numel() * (1 if number == "rounded" else len(x))
    return elapsed / done
