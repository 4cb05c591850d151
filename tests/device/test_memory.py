"""Memory estimates against processes that draw, and the batches and tiles that follow from them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from flashgen.artifact.store import Artifact
from flashgen.device import memory
from flashgen.device.memory import Plan, out_of_memory, plan, smaller_tile
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import MachineError
from flashgen.pixels import Size
from flashgen.runtime.memory import parse_bytes
from tests.device import handmade
from tests.device.handmade import CHANNELS, FACTOR, PATCH, PROMPTS, node, publish, save, weights

# ---- estimates against measured processes

LARGE = Size(512, 640)
DEEP = 32  # channels of the large decoder's convolutions
HIDDEN = 500_000  # numbers between the large transformer's two matrices, 64 MB


def write_large(folder: Path) -> None:
    """The handmade networks with 64 MB of weights in the transformer, and with convolutions at the picture's size in the decoder."""
    handmade.write_networks(folder)
    tokens, numbers = LARGE.height * LARGE.width // (FACTOR * PATCH) ** 2, CHANNELS * PATCH**2
    inputs = {
        "image": ["B", tokens, numbers], "time": ["B"], "text": ["B", "L", handmade.WIDTH], "text_mask": ["B", "L"],
        "summary": ["B", 2 * handmade.WIDTH + 2], "extra": ["B", 2, handmade.WIDTH],
    }  # fmt: skip
    save(
        folder / "transformer", inputs, ["noise_to_data"],
        [
            node("ReduceMean", "image", "mean", axes=[1]), node("MatMul", "mean up", "hidden"), node("MatMul", "hidden down", "shift"),
            node("Add", "image shift", "noise_to_data"),
        ],
        {"up": np.full((numbers, HIDDEN), 1e-4, np.float32), "down": np.full((HIDDEN, numbers), 1e-4, np.float32)},
    )  # fmt: skip
    padded: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    save(
        folder / "vae_decoder", {"latent_sample": ["B", CHANNELS, "h", "w"]}, ["sample"],
        [
            node("Conv", "latent_sample first", "deep", **padded),
            helper.make_node("Resize", ["deep", "", "scales"], ["large"], mode="nearest"),
            node("Conv", "large second", "mixed", **padded), node("Sigmoid", "mixed", "gate"), node("Mul", "mixed gate", "active"),
            node("Conv", "active third", "sample", **padded),
        ],
        {
            "first": weights("first", (DEEP, CHANNELS, 3, 3)), "second": weights("second", (DEEP, DEEP, 3, 3), 0.1),
            "third": weights("third", (3, DEEP, 3, 3), 0.1), "scales": np.array([1, 1, FACTOR, FACTOR], np.float32),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def large_device(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    graph = copy.deepcopy(handmade.DESCRIPTION)
    graph["latent_shape"] = [CHANNELS, LARGE.height // FACTOR, LARGE.width // FACTOR]
    graph["vae"]["channels"] = DEEP
    return publish(tmp_path_factory.mktemp("artifacts") / "large", graph, write_large, size_px=LARGE, sigmas=[1.0, 0.5, 0.0])


SCRIPT = """
import json, sys
from flashgen.artifact.store import open_artifact
from flashgen.device.memory import plan
from flashgen.device.sampler import DevicePipeline
from flashgen.runtime.memory import peak_rss_mib, resident_bytes
path, count, budget = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
artifact, start = open_artifact(path), resident_bytes()
within = plan(artifact, "onnxruntime", count, count, budget or None)
DevicePipeline(artifact).sample(["two"] * count, list(range(count)), within=within)
print(json.dumps({"start": start, "estimate": within.peak, "where": within.where, "rows": within.rows, "tile": within.tile,
    "peak": peak_rss_mib() * 2**20}))
"""


def draw_apart(artifact: Artifact, count: int, budget: float = 0) -> dict[str, Any]:
    """Draw `count` pictures in a process of its own; bytes that were estimated and measured."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(artifact.path), str(count), str(budget)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def six(large_device: Artifact) -> dict[str, Any]:
    """Six pictures without a budget."""
    return draw_apart(large_device, 6)


def test_estimate_is_near_the_measured_peak(large_device: Artifact, six: dict[str, Any]) -> None:
    one = draw_apart(large_device, 1)
    assert (one["where"], six["where"], six["tile"]) == ("transformer", "vae_decoder", None)
    for run in (one, six):
        ratio = (run["estimate"] - run["start"]) / (run["peak"] - run["start"])
        assert 0.8 < ratio < 2, run
    assert six["peak"] > 1.5 * one["peak"]  # else the transformer alone would decide both


def test_budget_is_kept_in_fact(large_device: Artifact, six: dict[str, Any]) -> None:
    budget = 450e6
    run = draw_apart(large_device, 6, budget)
    assert run["peak"] < budget and 1 <= run["rows"] < 6
    assert six["peak"] > 1.2 * budget  # without a budget it is more


# ---- batches and tiles


@pytest.fixture
def wide(handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The description of a large picture of 2:1, in a process of a fixed size, so that needs do not change between calls."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100e6)
    monkeypatch.setattr(memory, "total_bytes", lambda: 64e9)
    graph = copy.deepcopy(handmade.DESCRIPTION)
    graph["latent_shape"] = [CHANNELS, 128, 256]
    graph["vae"]["channels"] = 128
    graph["transformer"] |= {"tokens": 8192, "width": 1024}
    changes = {"extra": {"graph": graph}, "sampler": handmade.sampler(size_px=Size(512, 1024))}
    return Artifact(handmade_device.path, handmade_device.manifest.model_copy(update=changes))


def planned(artifact: Artifact, budget: float | None, count: int = 8, **asked: bool) -> Plan:
    return plan(artifact, "onnxruntime", count, 32, budget, **asked)


def test_batch_grows_with_the_budget_and_the_peak_stays_within(wide: Artifact) -> None:
    budgets = np.linspace(3.0e9, 25e9, 12)
    plans = [planned(wide, budget) for budget in budgets]
    assert all(one.peak <= budget for one, budget in zip(plans, budgets, strict=True))
    assert [one.batch for one in plans] == sorted(one.batch for one in plans)
    assert [one.rows for one in plans] == sorted(one.rows for one in plans)
    assert (plans[0].batch, plans[-1].batch) == (1, 8) and len({one.batch for one in plans}) > 4


def test_tiles_shrink_with_the_budget_and_cover_no_more_than_the_picture(wide: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = memory.Needs(wide, "onnxruntime", 1)
    assert needs.decoding(1, 256) > needs.decoding(1, 128) > needs.decoding(1, 64)
    monkeypatch.setattr(memory, "FUSED_WIDTHS", 0)  # let the decoder decide
    whole, tiles = planned(wide, 2e9, 1), [planned(wide, budget, 1).tile for budget in (0.26e9, 0.21e9, 0.175e9)]
    assert whole.tile is None and whole.where == "vae_decoder"
    assert tiles == [64, 48, 32]
    narrow = wide.manifest.model_copy(deep=True, update={"sampler": handmade.sampler(size_px=Size(1024, 512))})
    narrow.extra["graph"]["latent_shape"] = [CHANNELS, 256, 128]
    assert planned(Artifact(wide.path, narrow), 0.21e9, 1).tile == tiles[1]  # the same area


def test_attention_in_the_decoder_costs_the_square_of_a_tile(wide: Artifact) -> None:
    plain = memory.Needs(wide, "onnxruntime", 1)
    wide.manifest.extra["graph"]["vae"]["attention"] = True
    attentive = memory.Needs(wide, "onnxruntime", 1)
    extra = [attentive.decoding(1, tile) - plain.decoding(1, tile) for tile in (16, 32)]
    assert extra[1] == pytest.approx(16 * extra[0]) and extra[0] > 0


@pytest.mark.parametrize("asked", [{"guided": True}, {"preview": True}, {"init": True}])
def test_what_is_asked_for_costs_memory(asked: dict[str, bool], wide: Artifact) -> None:
    plain, costly = planned(wide, None, 1), planned(wide, None, 1, **asked)
    assert costly.peak > plain.peak if "init" not in asked else costly.peak >= plain.peak
    budget = 10e9
    assert planned(wide, budget, **asked).batch <= planned(wide, budget).batch
    assert planned(wide, budget, guided=True).batch < planned(wide, budget).batch


def test_without_a_budget_the_batch_stays_and_only_a_large_decoder_is_cut(wide: Artifact, handmade_device: Artifact) -> None:
    assert (planned(handmade_device, None).batch, planned(handmade_device, None).rows, planned(handmade_device, None).tile) == (8, 8, None)
    found = planned(wide, None)
    assert found.batch == 8 and 1 <= found.rows < 8 and found.tile is None
    wide.manifest.extra["graph"]["vae"]["channels"] = 1024
    found = planned(wide, None)
    assert (found.batch, found.rows) == (8, 1) and found.tile is not None


def test_without_a_budget_the_memory_of_the_machine_bounds_the_batch(wide: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 5 GB on a machine of 64 GB would be killed by the batch that the machine could take."""
    monkeypatch.setattr(memory, "total_bytes", lambda: 5e9)
    assert planned(wide, None).batch == planned(wide, 5e9).batch < 8
    monkeypatch.setattr(memory, "total_bytes", lambda: 50e6)
    assert (planned(wide, None).batch, planned(wide, None).tile) == (1, 16)  # an estimate alone refuses nobody a picture


def test_too_small_a_budget_names_one_that_is_enough(wide: Artifact) -> None:
    with pytest.raises(MachineError, match="is too little") as caught:
        planned(wide, 50e6)
    found = re.search(r"--memory (\S+) would do", str(caught.value))
    assert found is not None and planned(wide, parse_bytes(found[1])).batch == 1


# ---- memory that runs out


def test_decoder_that_runs_out_of_memory_goes_on_in_tiles(
    handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = DevicePipeline(handmade_device)
    run = pipeline.engine.run
    monkeypatch.setattr(memory, "TILES", (12, 6))

    def small(component: str, outputs: Any, feeds: Any) -> Any:
        if component == "vae_decoder" and max(feeds["latent_sample"].shape[2:]) > 6:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")
        return run(component, outputs, feeds)

    monkeypatch.setattr(pipeline.engine, "run", small)
    found = pipeline.sample(PROMPTS, [1, 2])
    assert capsys.readouterr().err.count("again in tiles of") == 2  # of 12 and of 6
    np.testing.assert_array_equal(found, DevicePipeline(handmade_device).sample(PROMPTS, [1, 2], within=Plan(2, 1, 6, 0, "")))
    assert len(pipeline.engine.laps.seconds["decode"]) == 2  # one per picture, whatever its tiles
    monkeypatch.setattr(memory, "TILES", (12,))
    with pytest.raises(MachineError, match="decoding one picture ran out of memory"):
        pipeline.sample(PROMPTS[:1], [1])


def test_other_failures_of_the_decoder_are_not_retried(handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DevicePipeline(handmade_device)

    def fail(*_: Any) -> Any:
        raise RuntimeError("bad shape")

    monkeypatch.setattr(pipeline.engine, "run", fail)
    with pytest.raises(RuntimeError, match="bad shape"):
        pipeline.decode(np.zeros((1, *handmade.LATENT), np.float32), pipeline.engine)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("Failed to allocate memory for requested buffer of size 1"))
    assert not out_of_memory(RuntimeError("invalid shape"))
    assert (smaller_tile(None, 128), smaller_tile(None, 64), smaller_tile(64, 128), smaller_tile(16, 128)) == (64, 48, 48, None)
