"""The device that a process computes on, and the numbers that it computes in there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flashgen.errors import MachineError, UsageError
from flashgen.runtime.processes import local_rank, world_size

if TYPE_CHECKING:
    import torch

ALONE, BESIDE = 0.8, 0.5  # share of an accelerator's free memory that a large text encoder may take: alone, and beside other networks
Precision = Literal["float32", "bfloat16"]


def device_of(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:N or mps. `auto` takes a CUDA GPU, else an Apple one, else the CPU.

    Of several processes on a machine each takes the GPU of its local rank. Raises MachineError when the device is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MachineError("--device mps: torch finds no Apple GPU here; leave the option out, or use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA driver or GPU"
        raise MachineError(f"--device {name}: {why}; check nvidia-smi, install torch from pytorch.org, or use --device cpu")
    index = local_rank() if world_size() > 1 else device.index or 0
    if index >= torch.cuda.device_count():
        raise MachineError(f"--device {name}: GPU {index} is asked for and {torch.cuda.device_count()} are there; start fewer processes")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    return torch.device("cuda", index)


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype called `precision`. Raises MachineError when `device` has none such."""
    import torch

    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise MachineError(f"{torch.cuda.get_device_name(device)} has no bfloat16; train with --set compute.precision=float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def drawing_dtype(device: torch.device) -> torch.dtype:
    """Type that a transformer draws in: bf16 on accelerators, fp16 on those without bf16, fp32 on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "mps" else torch.float32


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator in bytes, with what torch keeps of it for later tensors; None where that is not known."""
    import torch

    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def total_device_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator in bytes; None for the CPU and where it is not known."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def exact(device: torch.device) -> torch.device:
    """Where float64 is computed: on `device`, or on the CPU for Apple GPUs, which have no float64."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device
