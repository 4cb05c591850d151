"""A pretend accelerator for tests without a GPU: tensors live in CPU memory but say `pretend:0`.

Any operation that mixes them with CPU tensors raises, as CUDA would, so a forgotten `.to(device)` fails on every machine.
Checked with torch 2.13 (CPU build): Linear, autograd, AdamW and diffusers' SD3Transformer2DModel, forward and backward,
equal to the CPU within 4e-7. The hook `_setup_privateuseone_for_python_backend` is experimental in torch: keep it in tests only.
Autocast does not work on it (no kernels for AutocastPrivateUse1): run these tests in fp32. Importing this module changes the whole
process, so tests/accelerator/test_stages.py runs what imports it in processes of their own.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils._pytree import tree_flatten, tree_map

registration._setup_privateuseone_for_python_backend("pretend")
module: Any = registration._DummyBackendModule  # torch.distributed.checkpoint asks for streams, even for tensors on the CPU
stream = SimpleNamespace(synchronize=lambda: None)
module.current_stream, module.stream = lambda self: stream, lambda self, stream: nullcontext()
DEVICE = torch.device("pretend", 0)
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Pretend(torch.Tensor):
    """A tensor whose memory, `raw`, is the CPU's."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(operation, args, dict(kwargs or {}))


def raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretend) else value


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; raise when tensors of both devices meet (0-dim CPU tensors are allowed, as on CUDA)."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if operation is torch.ops.aten.copy_.default:
        raw(args[0]).copy_(raw(args[1]))
        return args[0]
    mixed = any(isinstance(t, Pretend) for t in tensors) and any(not isinstance(t, Pretend) and t.dim() > 0 for t in tensors)
    if operation not in COPIES and mixed:
        raise RuntimeError(f"{operation.name()}: tensors on pretend:0 and on the CPU")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    result = operation(*tree_map(raw, args), **tree_map(raw, kwargs))
    if asked is not None and torch.device(asked).type != "pretend":
        return result
    known = {id(t.raw): t for t in tensors if isinstance(t, Pretend)}  # in-place operations return their own tensor

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretend(value)

    return tree_map(wrap, result)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    raw(target).copy_(raw(source))
    return target


LIBRARY: Any = torch.library.Library("aten", "IMPL", "PrivateUse1")  # type: ignore[no-untyped-call]
LIBRARY.impl("empty.memory_format", _empty)
LIBRARY.impl("empty_strided", _empty_strided)
LIBRARY.impl("_copy_from", _copy_from)
torch.get_device_module("pretend").get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch's checkpointing asks for it
