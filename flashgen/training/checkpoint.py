"""Resume state of a training: what is saved, how often, and how it gets to the disk.

A checkpoint is a folder `step-000800`. torch.distributed.checkpoint writes its tensors as safetensors: each process writes its shards of
sharded tensors and its part of all others, and any number of processes reads them, sharded or not. Numbers, and the digests of the other
files, are in `STATE`. Nothing is pickled: torch.distributed.checkpoint's default format would be, in `.metadata` and in everything that
is no tensor.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flashgen.artifact.files import fsync, read_state, sha256, write_state, write_whole
from flashgen.errors import ArtifactError, MachineError
from flashgen.progress import warn
from flashgen.recipe.schema import CheckpointRecipe
from flashgen.runtime.processes import from_first, join, rank, wait_for_all, world_size
from flashgen.training.ranks import broadcast_flag

STATE = "checkpoint.state"
FILE_BYTES = 1 << 30  # of a file's tensors, about: serialising a file needs as much memory again


class Stateful(Protocol):
    """State that a checkpoint can hold: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, as they are in use, and numbers by name; an optimizer's state is taken from `Optimizer.state`."""


class Checkpoint:
    """The checkpoints of one training in `folder`: everything in `state`, the step, and metrics that are not logged yet.

    A save blocks the training while tensors are copied to the CPU; a thread writes the copies.
    """

    def __init__(self, folder: Path, state: Mapping[str, Stateful], recipe: CheckpointRecipe) -> None:
        self.folder, self.state, self.recipe = folder, state, recipe
        self.saved_at, self.blocked_s = time.monotonic(), 0.0
        self._thread, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)
        _group()

    def load(self) -> tuple[int, list[dict[str, float]]]:
        """Restore `state` from the newest checkpoint; returns (steps done, metrics not logged yet), (0, []) without one.

        All processes must call it. Raises ArtifactError for a damaged checkpoint.
        """
        if rank() == 0:
            shutil.rmtree(self.folder / ".tmp", ignore_errors=True)  # a kill inside a save has left it
        step, window, folders = 0, list[dict[str, float]](), checkpoints(self.folder)
        if folders:
            saved: dict[str, Any] = from_first(lambda: read_numbers(folders[-1]))
            entries, tensors = read_entries(folders[-1]), dict[str, Tensor]()
            for key, item in self.state.items():
                if key in saved["numbers"]:
                    item.load_state_dict(saved["numbers"][key])  # type: ignore[attr-defined]  # modules and optimizers have no numbers
                if isinstance(item, Optimizer):
                    _make_room(item, {name.removeprefix(f"{key}."): e for name, e in entries.items() if name.startswith(f"{key}.")})
                tensors |= {f"{key}.{name}": value for name, value in _entries(item) if isinstance(value, Tensor)}
            read_tensors(folders[-1], tensors)
            step, window = int(saved["step"]), saved["window"]
        wait_for_all()  # nobody removes the folder while another process reads it
        return step, window

    def due(self) -> bool:
        """True when `every_s` seconds have passed, blocking as long as last time stays within `share` of the time, and nothing is written.

        Rank 0 decides; all processes must call it.
        """
        elapsed = time.monotonic() - self.saved_at
        return broadcast_flag(self._writing.done() and elapsed >= max(self.recipe.every_s, self.blocked_s / self.recipe.share))

    @torch.no_grad()
    def save(self, step: int, window: list[dict[str, float]]) -> None:
        """Save the state after `step` steps. All processes must call it. Raises MachineError if the previous one could not be written."""
        start = time.monotonic()
        self.wait()
        numbers, copies, files, size = dict[str, dict[str, float]](), dict[str, Tensor](), dict[str, int](), 0
        for key, item in self.state.items():
            for name, value in _entries(item):
                if not isinstance(value, Tensor):
                    numbers.setdefault(key, {})[name] = value
                    continue
                if isinstance(value, DTensor) or len(files) % world_size() == rank():
                    copies[f"{key}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
                files[f"{key}.{name}"] = 1 + size // FILE_BYTES
                size += value.nbytes
        state = {"step": step, "window": window, "numbers": numbers}
        self._writing = self._thread.submit(self._write, step, copies, files, state)
        self.saved_at = time.monotonic()
        self.blocked_s = self.saved_at - start

    def wait(self) -> None:
        """Wait until the last save is on the disk. Raises MachineError if it is not."""
        try:
            self._writing.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise MachineError(f"a checkpoint in {self.folder} could not be written ({_reason(error)}); the one before is whole") from error

    def close(self) -> None:
        """`wait`, and end the thread."""
        self._thread.shutdown()
        self.wait()

    def _write(self, step: int, tensors: dict[str, Tensor], files: dict[str, int], state: dict[str, Any]) -> None:
        """Write a checkpoint beside the others and rename it; a kill or a power failure at any moment leaves whole ones alone."""
        temporary = self.folder / ".tmp"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)  # another process may have been faster
        _quiet()
        writer = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)  # syncs its files
        try:
            state_dict_saver.save(tensors, storage_writer=writer, process_group=_group(), no_dist=world_size() == 1)
            if rank() == 0:  # all processes have written
                digests = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
                write_state(temporary / STATE, json.dumps({**state, "files": digests}).encode())
                os.rename(temporary, self.folder / f"step-{step:06d}")
                fsync(self.folder)
        except BaseException:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # it would keep a full disk full
            raise
        if rank() == 0:
            for old in checkpoints(self.folder)[: -self.recipe.keep]:
                os.rename(old, temporary)
                shutil.rmtree(temporary)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a training's folder, by step."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """Step, numbers and metrics of a checkpoint, all of whose files are read. Raises ArtifactError if one of them is damaged."""
    try:
        if (saved := read_state(checkpoint / STATE)) is None:
            raise ArtifactError(f"{STATE} is missing")
        state: dict[str, Any] = json.loads(saved)
        damaged = [name for name, digest in state["files"].items() if sha256(checkpoint / name) != digest]
    except (OSError, ArtifactError) as error:
        raise _damaged(checkpoint, error) from error
    if damaged:
        raise _damaged(checkpoint, ArtifactError(f"the sha256 of {damaged[0]} differs"))
    return state


def read_entries(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Sizes and types of a checkpoint's full tensors by name. Raises ArtifactError if it is damaged."""
    try:
        metadata: dict[str, Any] = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error
    return {name: (entry.size, entry.properties.dtype) for name, entry in metadata.items()}


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded or not, with those of a checkpoint. All processes must call it. Raises ArtifactError if it is damaged."""
    _quiet()
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        state_dict_loader.load(dict(tensors), storage_reader=reader, process_group=_group(), no_dist=world_size() == 1)
    except CheckpointException as error:
        raise _damaged(checkpoint, error) from error


def _entries(item: Stateful) -> Iterator[tuple[str, Any]]:
    """Names and values of what a checkpoint holds of `item`.

    Of a module no buffers: position tables (900 MB of SD3.5-Medium) that nothing changes. Of an optimizer the state of each parameter, by
    its place; learning rates follow from the recipe and the step.
    """
    if isinstance(item, Optimizer):
        for place, parameter in enumerate(_parameters(item)):
            state: dict[str, Any] = item.state.get(parameter, {})
            yield from ((f"{place}.{key}", torch.as_tensor(value)) for key, value in state.items())  # bitsandbytes counts steps in an int
        return
    buffers = dict(item.named_buffers()) if isinstance(item, nn.Module) else {}
    yield from ((name, value) for name, value in item.state_dict().items() if name not in buffers)


def _make_room(optimizer: Optimizer, entries: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give an optimizer, which makes its state in its first step, a state of these sizes and types, for a checkpoint to fill."""
    parameters = _parameters(optimizer)
    fused = any(group.get("fused") for group in optimizer.param_groups)  # keeps the number of steps beside the parameters
    for name, (size, dtype) in entries.items():
        place, key = name.split(".")
        p = parameters[int(place)]
        device = p.device if fused or size else torch.device("cpu")
        optimizer.state[p][key] = torch.zeros_like(p, dtype=dtype) if size == p.shape else torch.zeros(size, dtype=dtype, device=device)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@cache
def _group() -> Any:
    """A gloo group for checkpoints alone, whose thread must not meet the training's messages; None for one process."""
    if world_size() == 1:
        return None
    join()
    return torch.distributed.new_group(backend="gloo")


def _quiet() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is for one process


def _damaged(checkpoint: Path, error: BaseException) -> ArtifactError:
    return ArtifactError(f"{checkpoint} is damaged ({_reason(error)}); remove it to go on from the checkpoint before, or from the start")


def _reason(error: BaseException) -> str:
    """The first line of an error, of the first process's where several have failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0] or type(error).__name__


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain data, for `load_state`; a kill or a power failure at any moment leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_state(path, buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any] | None:
    """Contents of a file of `save_state`; None if there is no file or, with a warning, if the file is damaged: it is computed again."""
    try:
        data = read_state(path)
    except ArtifactError as error:
        warn(f"{error}. What it held is computed again")
        return None
    return None if data is None else dict(torch.load(io.BytesIO(data), weights_only=True))


def truncate_stats(path: Path, phase: str, step: int) -> None:
    """Remove rows of `phase` behind `step`, which a resumed run writes again, and a line that a kill cut short."""
    if path.exists():
        rows = [row for row in path.read_text(errors="replace").splitlines() if _is_kept(row, phase, step)]
        write_whole(path, "".join(row + "\n" for row in rows).encode())


def _is_kept(row: str, phase: str, step: int) -> bool:
    try:
        data = json.loads(row)
        return bool(data["phase"] != phase or data["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False
