"""Networks sharded over the processes with FSDP2, where `accelerate launch` asks for it; elsewhere nothing here changes a network.

A block's weights are gathered for its forward and for its backward pass, and gradients are averaged as they are sharded again.
Checkpoints (`training.checkpoint`) of one process, several, and several with shards resume each other.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flashgen.families.base import Family
from flashgen.progress import say
from flashgen.runtime.processes import join, sharded, world_size

Network = TypeVar("Network", bound=nn.Module)


@cache
def _mesh(device_type: str) -> DeviceMesh:
    join()
    return init_device_mesh(device_type, (world_size(),))


def shard(network: Network, family: Family) -> Network:
    """Shard a transformer, equal in all processes, in place: each process keeps its rows of every weight. Returns `network`.

    Adapters are sharded with the weights that they belong to. From then on all processes must call the network equally often.
    """
    if sharded():
        parts: list[nn.Module] = [*family.blocks(network), network]
        for part in parts:  # the root is sharded again after a forward pass: weights are read between passes
            fully_shard(part, mesh=_mesh(next(network.parameters()).device.type), reshard_after_forward=True)
        local = sum(p.to_local().numel() for p in network.parameters() if isinstance(p, DTensor))
        say(f"FSDP2: the first process keeps {local} of {sum(p.numel() for p in network.parameters())} weights")
    return network


def full(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of it where it is sharded; then all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_network(network: nn.Module, family: Family) -> nn.Module:
    """`network` itself, or a full copy in every process if it is a sharded transformer."""
    if not sharded():
        return network
    whole: nn.Module = family.network_classes()["transformer"].from_config(network.config)
    # gathered one tensor at a time, so that an accelerator never holds them all
    whole.load_state_dict({name: full(value).cpu() for name, value in network.state_dict().items()})
    return whole.eval()


def shard_like(value: Tensor, like: Tensor | None) -> Tensor:
    """Shard `value` like `like`; return it unchanged if `like` is not sharded."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    local = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # every process has `value`: nothing is sent
    return local.clone()  # not a view, which would keep the full tensor alive
