"""Which of several processes this one is, as `accelerate launch` and `torchrun` tell it. Imports nothing heavy."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from flashgen.errors import FlashgenError, UsageError
from flashgen.runtime.environment import number

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
WATCH_S = 0.5
_device_type = "cpu"


def world_size() -> int:
    """Number of processes of this launch; 1 without a launcher."""
    return number("WORLD_SIZE") or 1


def rank() -> int:
    """Number of this process; process 0 writes, prints and publishes. RANK alone, as some cluster managers set it, means nothing."""
    found = number("RANK") or 0
    return found if found < world_size() else 0


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return number("LOCAL_RANK") or 0 if world_size() > 1 else 0


def check_batch(batch: int, processes: int | None = None) -> None:
    """Raises UsageError when the processes, those of this launch by default, cannot share a batch evenly."""
    count = processes or world_size()
    if batch % count:
        raise UsageError(f"a batch of {batch} cannot be shared by {count} processes; give a multiple of {count}")


def sharded() -> bool:
    """Return True if `accelerate launch` asks for FSDP: networks sharded over the processes (`training.shards`)."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def check_launch() -> None:
    """Raises UsageError for settings of `accelerate launch` that no training here would follow."""
    if (number := os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()) != "no":
        raise UsageError(
            f"--mixed_precision {number} is not followed: the recipe says what a training computes in; launch with --mixed_precision no"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError("DeepSpeed is not followed; launch with --multi_gpu, or with recipes/accelerate/fsdp2.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise UsageError(
            "fsdp_offload_params is not followed: weights stay on the accelerators that they are sharded over; set it to false, and for "
            "less memory use more processes, distill.lora, compute.activation_checkpointing=true or a lower compute.micro_batch"
        )


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        join().wait_for_everyone()


def compute_on(device_type: str) -> None:
    """Say, before the processes join, what they compute on."""
    global _device_type
    _device_type = device_type


def end_with_parent(clean: Callable[[], object] = lambda: None) -> None:
    """Let this process end within a second of its parent's end, however that comes about, after a call of `clean`.

    Windows does not tell of it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        clean()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def join() -> PartialState:
    """The process group that the launcher describes, joined once: NCCL for tensors on GPUs, gloo for those on the CPU."""
    import torch
    from accelerate import PartialState

    if _device_type == "cuda" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cuda:nccl,cpu:gloo")  # Accelerate would take NCCL alone
    state = PartialState(cpu=_device_type == "cpu")
    atexit.register(state.destroy_process_group)  # threads of gloo that are alive at the end abort the process
    return state


def speaks_for_itself(error: BaseException) -> bool:
    """Return True if the first process does not know `error`: another one got it while it worked with the others."""
    return rank() > 0 and join.cache_info().currsize > 0 and not getattr(error, "is_shared", False)


def from_first(function: Callable[[], T]) -> T:
    """Result of `function`, which process 0 alone calls, in every process. A FlashgenError is raised in all of them."""
    if world_size() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    join()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except FlashgenError as error:
            error.is_shared = True
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
