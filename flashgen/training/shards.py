"""Networks cut over the processes with FSDP2, where `accelerate launch` asks for it; elsewhere they stay what they are.

A block's weights are gathered for its forward and for its backward pass, and gradients are averaged as they are cut again.
Checkpoints hold whole tensors: one process, several and several sharded resume each other's.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flashgen.processes import join, sharded, world
from flashgen.progress import say

Network = TypeVar("Network", bound=nn.Module)


@cache
def _mesh() -> DeviceMesh:
    join()
    return init_device_mesh("cpu", (world(),))


def shard(network: Network) -> Network:
    """`network` itself, a transformer that is equal in all processes; each keeps its rows of every weight."""
    if sharded():
        blocks: Any = network.transformer_blocks
        for part in (*blocks, network):  # the root too is cut again after a forward: weights are read between passes
            fully_shard(part, mesh=_mesh(), reshard_after_forward=True)
        own = sum(p.to_local().numel() for p in network.parameters() if isinstance(p, DTensor))
        say(f"FSDP2: the first process keeps {own} of {sum(p.numel() for p in network.parameters())} weights")
    return network


@torch.no_grad()
def whole(state: Any, *, keep: bool = True) -> Any:
    """`state`, a tensor or nested dicts, with what is cut gathered (then dropped, unless `keep`). All must call it."""
    if isinstance(state, dict):
        return {key: whole(value, keep=keep) for key, value in state.items()}
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered if keep else None
    return state


def whole_network(network: nn.Module) -> nn.Module:
    """`network` itself, or of a sharded one a whole copy in every process."""
    if not sharded():
        return network
    copied: nn.Module = SD3Transformer2DModel.from_config(network.config)
    copied.load_state_dict(whole(network.state_dict()))
    return copied.eval()


def cut(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole `value` cut as `like` is, if it is."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    own = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # all have it: nothing is sent
    return own.clone()  # not a view that keeps the whole alive


def load(item: Any, saved: dict[str, Any]) -> None:
    """`item.load_state_dict(saved)`, from the whole tensors of a checkpoint."""
    if isinstance(item, nn.Module):
        own = item.state_dict()
        saved = {key: cut(value, own.get(key)) for key, value in saved.items()}
    item.load_state_dict(saved)
    if isinstance(item, torch.optim.Optimizer):
        for parameter, state in item.state.items():
            state.update({key: cut(value, parameter) for key, value in state.items() if value.shape == parameter.shape})
