"""Which of several processes this one is, as `accelerate launch` and `torchrun` say it. Imports nothing heavy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flashgen.errors import UsageError

if TYPE_CHECKING:
    from accelerate import PartialState


def rank() -> int:
    """0 for the one that writes, prints and publishes."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_batch(batch: int) -> None:
    """Raises UsageError when the processes cannot share it evenly."""
    if batch % world():
        raise UsageError(f"a batch of {batch} cannot be shared by {world()} processes; give a multiple of {world()}")


def sharded() -> bool:
    """Whether `accelerate launch` asks for FSDP: networks cut over the processes (`training.shards`)."""
    return world() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def check_launch() -> None:
    """Raises UsageError for what `accelerate launch` was told that no training here would follow."""
    if (number := os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()) != "no":
        raise UsageError(
            f"--mixed_precision {number} is not followed: what trainings compute in is the recipe's; launch with --mixed_precision no"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError("DeepSpeed is not followed; launch with --multi_gpu, or with recipes/accelerate/fsdp2.yaml")


def wait_for_all() -> None:
    """Until every process is here."""
    if world() > 1:
        join().wait_for_everyone()


def join() -> PartialState:
    """The group that the launcher describes, joined once. On gloo: flashgen trains on the CPU, also beside a GPU."""
    from accelerate import PartialState

    return PartialState(cpu=True)
