"""Machines that a plan is for: this one, or one that `--plan --on` names by its accelerators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flashgen.errors import UsageError
from flashgen.runtime.memory import parse_bytes, total_bytes
from flashgen.runtime.processes import sharded, world_size

if TYPE_CHECKING:
    import torch

PEAK_SHARE = 0.4  # of the peak, for hours on a machine that is not this one; nobody has measured it
DRIVER = 6e8  # bytes of an accelerator that its driver and torch's libraries take (our estimate)

# Peak TFLOP/s of dense bf16 products on tensor cores that sum in fp32, by the device's name: from data sheets and architecture papers,
# which also name twice the number, for sparse matrices. TF32, in which flashgen computes fp32 on CUDA, has half of it.
PEAK_TFLOPS: Mapping[str, float] = {
    "NVIDIA B200": 2250, "NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA GH200 480GB": 989.4, "NVIDIA H800": 989.4,
    "NVIDIA H200 NVL": 835, "NVIDIA H100 NVL": 835, "NVIDIA H100 PCIe": 756, "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA L40S": 362, "NVIDIA L40": 181, "NVIDIA L4": 121, "NVIDIA A40": 150, "NVIDIA A30": 165, "NVIDIA A10": 125,
    "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 3090": 71.2,
    "AMD Instinct MI300X": 1307,
}  # fmt: skip
# Memory in GB, and the device. H100 and H200 are the SXM modules.
ACCELERATORS: Mapping[str, tuple[float, str]] = {
    "rtx3090": (24, "NVIDIA GeForce RTX 3090"),
    "rtx4090": (24, "NVIDIA GeForce RTX 4090"),
    "rtx5090": (32, "NVIDIA GeForce RTX 5090"),
    "l40s": (48, "NVIDIA L40S"),
    "a100": (80, "NVIDIA A100-SXM4-80GB"),
    "h100": (80, "NVIDIA H100 80GB HBM3"),
    "h200": (141, "NVIDIA H200"),
}
BY_MEMORY = {24: "rtx3090", 32: "rtx5090", 48: "l40s", 80: "a100", 141: "h200"}  # the slowest one of a size; hours are then at most that


@dataclass(frozen=True)
class Machine:
    """Processes that train together, each with memory of its own.

    `bytes` is the memory of each process's accelerator, or this machine's without one; None where it is unknown. `peak` is the FLOP/s of
    one accelerator by type of number, of a named machine only. `sharded`: FSDP2 shares the networks out over the processes.
    """

    bytes: float | None
    processes: int = 1
    accelerated: bool = False
    sharded: bool = False
    peak: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    like: str = ""  # the accelerator whose peak it is

    @property
    def shards(self) -> int:
        """Number of processes over which each network is shared out."""
        return self.processes if self.sharded else 1


def this_machine(device: torch.device) -> Machine:
    """The machine of this launch, whose processes compute on `device`."""
    from flashgen.runtime.accelerator import total_device_bytes

    accelerated = device.type != "cpu"
    size = total_device_bytes(device) or total_bytes()  # an Apple GPU shares the machine's memory
    return Machine(size, world_size(), accelerated, sharded())


def machine_named(text: str) -> Machine:
    """The machine that `--on TEXT` names: `rtx4090`, `8xh100`, `24GB` or `8x80GB`; GB are 1e9 bytes. Raises UsageError for others.

    Hours on a machine that is given by its memory alone are those of the slowest accelerator in the table with that memory, or with the
    next smaller one.
    """
    match = re.fullmatch(r"(?:(\d{1,6})x)?(.+)", text.strip().lower())
    assert match is not None or not text.strip()
    count, what = (int(match[1] or 1), match[2]) if match else (0, "")
    if what in ACCELERATORS:
        like, size = what, ACCELERATORS[what][0] * 1e9
    else:
        try:
            size = parse_bytes(what)
        except UsageError:
            size = 0.0
        like = BY_MEMORY[max((gb for gb in BY_MEMORY if gb * 1e9 <= size), default=min(BY_MEMORY))]
    if not count or not size:
        known = ", ".join(ACCELERATORS)
        raise UsageError(f"--on {text}: write a number of accelerators and their memory or name, as in 24GB, 8x80GB or 8xh100 ({known})")
    bf16 = 1e12 * PEAK_TFLOPS[ACCELERATORS[like][1]]
    return Machine(size, count, True, False, {"bf16": bf16, "fp32": bf16 / 2}, text, like)


def bf16_peak(device: str) -> float | None:
    """FLOP/s of dense bf16 products that the device of this name could reach; None where no data sheet was read."""
    return 1e12 * PEAK_TFLOPS[device] if device in PEAK_TFLOPS else None
