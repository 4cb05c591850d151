"""Needs of a stage: memory of one process by phase and component, disk, forward passes and time.

Weights are counted tensor by tensor. Activations follow from the shapes and from the family's measured `costs`; docs/fullsize.md compares
the sums with measurements.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.artifact.draft import cache_folder
from flashgen.artifact.files import check_disk, disk_bytes
from flashgen.errors import MachineError
from flashgen.models.footprint import Footprint, Parts
from flashgen.progress import say
from flashgen.recipe.schema import BenchRecipe
from flashgen.runtime.accelerator import BESIDE, free_bytes
from flashgen.runtime.machines import DRIVER, PEAK_SHARE, Machine
from flashgen.runtime.memory import total_bytes

if TYPE_CHECKING:
    from flashgen.stages.base import Stage

ON_CPU = " (CPU)"  # end of the name of a component that lies in the CPU's memory where a stage computes on an accelerator
ROOM = 0.85  # share of the memory that an automatic micro-batch may fill: a measured peak was 14 % above its plan (docs/fullsize.md)
LARGEST_POWER = 12  # of two, of an automatic micro-batch
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
    machine: Machine = field(default_factory=lambda: Machine(total_bytes()))
    micro_batch: int | None = None  # samples of the largest training that pass together

    @property
    def limited(self) -> dict[str, Parts]:
        """Memory that `machine.bytes` limits, by phase: the accelerator's, or all of it without one."""
        if not self.machine.accelerated:
            return self.memory
        on_device = {phase: {n: size for n, size in parts.items() if not _on_cpu(n)} for phase, parts in self.memory.items()}
        return {phase: parts | {"driver": DRIVER} for phase, parts in on_device.items()}

    @property
    def peak(self) -> float:
        """Bytes of `limited` memory in the largest phase."""
        return max(sum(parts.values()) for parts in self.limited.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is enough, or unknown."""
        return self.machine.bytes is None or self.peak <= self.machine.bytes

    def add_validation(self, footprint: Footprint, bench: BenchRecipe, pictures: int) -> None:
        """Add the phase that draws `pictures` with the result, if there are any."""
        if not pictures:
            return
        one, batch, size = footprint.forward(), min(bench.batch, pictures), 2.0 if self.machine.accelerated else 4.0
        networks = {"transformer": size * footprint.parts["transformer"].count, "vae": 4.0 * footprint.parts["vae"].count}
        room = BESIDE * (self.machine.bytes or 0) if self.machine.accelerated else 0
        activations = {"activations": size * batch * one.hidden * footprint.family.costs.running}
        self.memory["validate"] = footprint.embedding(batch, room)[0] | networks | activations
        self.advice["validate"] = f"validation draws {batch} pictures together: --set bench.batch=1, or none with --set bench.per_task=0"

    def check(self, stage: str, out: Path, work: Path) -> None:
        """Raises MachineError, before any work, when memory or disk are too small; the message says which setting lowers the need.

        Files that an earlier run has left in `work` or in the cache of `out` need no disk again.
        """
        check_disk(out, int(self.disk - min(self.cached, disk_bytes(cache_folder(out)))) - disk_bytes(work))
        if not self.fits:
            raise MachineError(self.lacking(stage))

    def lacking(self, stage: str) -> str:
        """The need of a plan that does not fit and the settings that lower it, in one sentence."""
        phase, parts = max(self.limited.items(), key=lambda item: sum(item[1].values()))
        largest = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sorted(parts.items(), key=lambda item: -item[1])[:3])
        needs = f"{stage} needs {self.peak / 2**30:.1f} GiB of memory in its phase '{phase}' (GiB: {largest})"
        available = (self.machine.bytes or 0) / 2**30
        return f"{needs}, {available:.1f} are there; {self.advice.get(phase, 'run it where more memory is free')}"

    def describe(self) -> dict[str, Any]:
        """The plan as JSON data, for `--plan`; memory is that of one process."""
        machine = self.machine
        host = {phase: {n: int(size) for n, size in parts.items() if _on_cpu(n)} for phase, parts in self.memory.items()}
        return {
            "memory": {phase: {name: int(size) for name, size in parts.items()} for phase, parts in self.limited.items()},
            "memory_bytes": int(self.peak),
            **({"host_memory": host} if machine.accelerated else {}),
            "machine_bytes": None if machine.bytes is None else int(machine.bytes),
            "micro_batch": self.micro_batch,
            "disk_bytes": int(self.disk),
            "forwards": self.forwards,
            "seconds": self.seconds(),
            **(self._on_named() if machine.name else {}),
        }

    def _on_named(self) -> dict[str, Any]:
        """Entries that a plan for another machine has in addition."""
        machine = self.machine
        peaks = " and ".join(f"{peak / 1e12:g} TFLOP/s in {number}" for number, peak in machine.peak.items())
        assumed = f"hours assume {PEAK_SHARE:.0%} of the peak of {machine.processes} x {machine.like}, {peaks} each"
        return {
            "machine": machine.name,
            "processes": machine.processes,
            "sharded": machine.sharded,
            "fits": self.fits,
            "hours": round(self.seconds() / 3600, 2),
            "assumption": f"{assumed}; nobody has measured this share, and pictures, files and waiting are not counted",
        }

    def seconds(self) -> float:
        """Estimated time: from a measurement of matrix products and of rounding here (`CALIBRATION_S` each), or from a machine's peak.

        Rounding of weights is not counted where the peak is used.
        """
        peak = {number: PEAK_SHARE * value * self.machine.processes for number, value in self.machine.peak.items()}
        if peak:
            return round(sum(2 * amount / peak[number] for number, amount in self.work.items() if number in peak), 1)
        return round(sum(amount * _seconds_each(number) for number, amount in self.work.items() if amount), 1)


def largest_micro_batch(stage: Stage) -> int:
    """The micro-batch with which the stage's plan stays within `ROOM` of the free memory: 0 (all samples), else a power of two.

    1 where nothing fits: the plan's own check then says what is lacking.
    """
    free = stage.machine.bytes if stage.on else free_bytes(stage.device) or stage.machine.bytes

    def is_too_large(size: int) -> bool:
        plan = stage.plan_with(size)
        return plan is not None and free is not None and plan.peak > ROOM * free

    chosen = 1 << bisect_left(range(1, LARGEST_POWER + 1), True, key=lambda power: is_too_large(1 << power)) if is_too_large(0) else 0
    say(f"{stage.name}: compute.micro_batch=auto is {chosen or 'all samples of a process'}")
    return chosen


def _on_cpu(name: str) -> bool:
    return name == "program" or name.endswith(ON_CPU)


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
