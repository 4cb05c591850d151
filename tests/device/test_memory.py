from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import memory
from flashgen.device.memory import Plan, out_of_memory, parse_bytes, plan, smaller_tile
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import MachineError, UsageError

PROMPTS = ["two red circles", "a blue square"]


def test_bytes_have_a_unit() -> None:
    assert [parse_bytes(text) for text in ("2GB", "900mb", "1.5GiB")] == [2e9, 9e8, 1.5 * 2**30]
    for text in ("", "2", "GB", "-2GB", "2TB", "2 GB each"):
        with pytest.raises(UsageError, match=r"--memory .*as in --memory 2GB"):
            parse_bytes(text)


@pytest.fixture
def needs(tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> memory.Needs:
    """With a process of a fixed size, so that needs do not change between calls."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100e6)
    return memory.Needs(tiny_device, "onnxruntime", 8, False, False)


def test_the_batch_is_the_largest_within_the_budget(tiny_device: Artifact, needs: memory.Needs) -> None:
    for batch in (1, 3, 8):
        budget = max(*needs.drawing(batch).values(), needs.decoding(1, needs.side))
        found = plan(tiny_device, "onnxruntime", 8, 32, budget)
        assert found.batch >= batch and found.peak <= budget
        assert found.batch == 8 or max(needs.drawing(found.batch + 1).values()) > budget
        assert needs.decoding(found.rows, needs.side) <= budget


def test_without_a_budget_the_batch_stays_and_only_a_large_decoder_is_cut(
    tiny_device: Artifact, needs: memory.Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(tiny_device, "onnxruntime", 8, 32).batch == plan(tiny_device, "onnxruntime", 8, 32).rows == 8
    monkeypatch.setattr(memory, "DECODE_BYTES", needs.decode_activations(3, needs.side) + 1)
    found = plan(tiny_device, "onnxruntime", 8, 32)
    assert (found.batch, found.rows, found.tile) == (8, 3, None)
    monkeypatch.setattr(memory, "TILES", (6, 4))
    monkeypatch.setattr(memory, "DECODE_BYTES", needs.decode_activations(1, 6) + 1)
    found = plan(tiny_device, "onnxruntime", 8, 32)
    assert (found.batch, found.rows, found.tile) == (8, 1, 6)


def test_guidance_and_preview_cost_memory(tiny_device: Artifact, needs: memory.Needs) -> None:
    plain = needs.drawing(1)["transformer"]
    for guided, preview in ((True, False), (False, True)):
        assert memory.Needs(tiny_device, "onnxruntime", 8, guided, preview).drawing(1)["transformer"] > plain


def test_too_small_a_budget_says_which_would_do(tiny_device: Artifact, needs: memory.Needs) -> None:
    with pytest.raises(MachineError, match="is too little") as caught:
        plan(tiny_device, "onnxruntime", 8, 32, 50e6)
    found = re.search(r"--memory (\S+) would do", str(caught.value))
    assert found is not None
    assert plan(tiny_device, "onnxruntime", 8, 32, parse_bytes(found[1])).batch >= 1


def test_tiles_and_batches_keep_the_picture(tiny_device: Artifact) -> None:
    pipeline = DevicePipeline(tiny_device)
    whole = pipeline.sample(PROMPTS, [1, 2]).astype(float)
    one_by_one = pipeline.sample(PROMPTS, [1, 2], within=Plan(1, 1, None, 0, "")).astype(float)
    assert np.abs(one_by_one - whole).max() <= 1
    tiled = pipeline.sample(PROMPTS, [1, 2], within=Plan(2, 1, 6, 0, "")).astype(float)
    assert tiled.shape == whole.shape
    # Group norms see the tile alone, so it differs, but much less than another picture does.
    assert 0 < np.mean((tiled - whole) ** 2) < 0.5 * np.mean((whole[::-1] - whole) ** 2)


def test_decoder_that_runs_out_of_memory_goes_on_in_tiles(
    tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = DevicePipeline(tiny_device)
    run = pipeline.engine.run
    monkeypatch.setattr(memory, "TILES", (6, 4))

    def small(component: str, outputs: Any, feeds: Any) -> Any:
        if component == "vae_decoder" and feeds["latent_sample"].shape[-1] > 4:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")
        return run(component, outputs, feeds)

    monkeypatch.setattr(pipeline.engine, "run", small)
    got = pipeline.sample(PROMPTS, [1, 2])
    assert capsys.readouterr().err.count("again in tiles of") == 2  # of 6 and of 4
    np.testing.assert_array_equal(got, DevicePipeline(tiny_device).sample(PROMPTS, [1, 2], within=Plan(2, 1, 4, 0, "")))
    assert len(pipeline.engine.laps.seconds["decode"]) == 2  # a picture is one, whatever its tiles
    monkeypatch.setattr(memory, "TILES", (6,))
    with pytest.raises(MachineError, match="decoding one picture ran out of memory"):
        pipeline.sample(PROMPTS[:1], [1])


def test_other_failures_of_the_decoder_are_not_retried(tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DevicePipeline(tiny_device)

    def fail(*_: Any) -> Any:
        raise RuntimeError("bad shape")

    monkeypatch.setattr(pipeline.engine, "run", fail)
    with pytest.raises(RuntimeError, match="bad shape"):
        pipeline.decode(np.zeros((1, 16, 8, 8), np.float32), pipeline.engine)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("Failed to allocate memory for requested buffer of size 1"))
    assert not out_of_memory(RuntimeError("invalid shape"))
    assert (smaller_tile(None, 128), smaller_tile(None, 64), smaller_tile(64, 128), smaller_tile(16, 128)) == (64, 48, 48, None)
