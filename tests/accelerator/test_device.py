"""Which device a command takes, and what it says about one that is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashgen.errors import MachineError, UsageError
from flashgen.runtime import accelerator
from flashgen.runtime.accelerator import device_of, drawing_dtype, dtype_of, exact, free_bytes, total_device_bytes
from tests import runs
from tests.stages.chain import micro

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, as far as torch.cuda's answers go; the list gets the numbers of those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    return chosen


def test_without_an_accelerator_auto_is_the_cpu_and_others_are_one_sentence() -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is an accelerator")
    assert device_of("auto") == device_of("cpu") == CPU
    with pytest.raises(MachineError, match=r"--device cuda:1: .*CUDA.*--device cpu"):
        device_of("cuda:1")
    with pytest.raises(MachineError, match="--device mps: torch finds no Apple GPU"):
        device_of("mps")
    with pytest.raises(UsageError, match="--device tpu: use auto, cpu, cuda, cuda:N or mps"):
        device_of("tpu")


def test_a_gpu_is_taken_by_its_number_and_by_the_local_rank(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("auto") == CUDA and device_of("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("cuda") == torch.device("cuda", 1) and gpus == [0, 1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match="GPU 2 is asked for and 2 are there; start fewer processes"):
        device_of("cuda")


def test_a_gpu_without_bf16_refuses_it_for_training_and_draws_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GTX 1080")
    with pytest.raises(MachineError, match=r"GTX 1080 has no bfloat16; train with --set compute\.precision=float32"):
        dtype_of("bfloat16", CUDA)
    assert dtype_of("float32", CUDA) == torch.float32 and drawing_dtype(CUDA) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert dtype_of("bfloat16", CUDA) == drawing_dtype(CUDA) == torch.bfloat16 and drawing_dtype(CPU) == torch.float32


def test_float64_is_computed_on_the_cpu_for_apple_gpus_and_a_plan_counts_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (exact(MPS), exact(CUDA), exact(CPU)) == (CPU, CUDA, CPU)
    assert total_device_bytes(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    assert accelerator.total_device_bytes(CUDA) == 24 << 30


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (3, 24), "memory_reserved": 9, "memory_allocated": 4}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_bytes(CUDA) == 3 + 9 - 4 and free_bytes(CPU) is None


def test_a_stage_that_computes_on_the_cpu_takes_no_other_device(tmp_path: Path) -> None:
    token = runs.DEVICE.set("cuda")
    try:
        with pytest.raises(UsageError, match="--device cuda: export computes on the CPU; leave the option out"):
            runs.export(tmp_path / "student", tmp_path / "out", micro())
    finally:
        runs.DEVICE.reset(token)
