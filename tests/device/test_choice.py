"""`--engine auto` measures once, only where that can save more than it costs, and survives engines that fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from flashgen.artifact.manifest import File
from flashgen.artifact.store import Artifact
from flashgen.device import choice, engine
from flashgen.device.choice import Seconds, choose, installed, is_worth_measuring, measure
from flashgen.device.engine import Engine, OnnxRuntimeNetwork
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, MachineError

BOTH = ["onnxruntime", "openvino"]
MANY = 1000  # steps for which even a small network is worth measuring


@pytest.fixture
def device(handmade_device: Artifact) -> Artifact:
    """An artifact whose transformer seems to have 1.3 GB, as SD3.5-Medium's in INT4 has."""
    large = File(path="transformer/model.onnx_data", size=1_300_000_000, sha256="0" * 64)
    manifest = handmade_device.manifest
    return dataclasses.replace(handmade_device, manifest=manifest.model_copy(update={"files": [*manifest.files, large]}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flashgen" / "engines.json"


def pretend(monkeypatch: pytest.MonkeyPatch, **seconds: Seconds | Exception) -> list[tuple[str, float]]:
    """Replace measuring by `seconds`; returns the list of (engine, deadline) that are measured."""
    asked: list[tuple[str, float]] = []

    def measure(artifact: Artifact, name: str, deadline_s: float) -> Seconds:
        asked.append((name, deadline_s))
        outcome = seconds[name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(choice, "measure", measure)
    return asked


def test_the_only_engine_is_taken_without_measuring(device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(choice, "measure", None)
    assert choose(device, MANY, installed()) == "onnxruntime"


def test_auto_measures_once_and_takes_the_engine_that_finishes_first(
    device: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(monkeypatch, onnxruntime=Seconds(0.1, 0.2), openvino=Seconds(0.4, 0.1))
    # At two steps onnxruntime is done before OpenVINO has loaded; the measurement is there by then.
    assert [choose(device, steps, BOTH[::-1]) for steps in (40, 40, 2)] == ["openvino", "openvino", "onnxruntime"]
    assert [name for name, _ in asked] == BOTH  # onnxruntime first, whatever the order of names
    assert asked[1][1] == pytest.approx(2 + (0.1 + 40 * 0.2) / 2)  # a start and half of what the job takes
    assert "engine: openvino for 40 steps (onnxruntime 0.1 s to load and 200 ms per step, openvino 0.4 s" in capsys.readouterr().err
    key = next(iter(json.loads(cache.read_text())))
    for strange in ("{", "[]", json.dumps({key: {}}), json.dumps({key: 3}), '{"a": {"onnxruntime": 0.2}}'):
        cache.write_text(strange)
        assert choose(device, 40, BOTH) == "openvino"
    assert list(json.loads(cache.read_text()).values()) == [{"onnxruntime": [0.1, 0.2], "openvino": [0.4, 0.1]}]


def test_short_jobs_are_not_measured(device: Artifact, handmade_device: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of four steps cannot win back two loads and two steps; of a network of some kilobytes no job can that ends in seconds."""
    monkeypatch.setattr(choice, "measure", None)
    assert not is_worth_measuring(device, 8) and is_worth_measuring(device, 10)
    assert not is_worth_measuring(handmade_device, MANY)
    assert choose(device, 4, BOTH) == "onnxruntime"
    rounded = dataclasses.replace(
        device, manifest=device.manifest.model_copy(update={"extra": device.manifest.extra | {"accuracy_level": 4}})
    )
    assert choose(rounded, 4, BOTH) == "openvino"
    assert not cache.exists()


@pytest.mark.parametrize("error", [MachineError("too slow"), RuntimeError("no such instruction"), MemoryError()])
def test_an_engine_that_fails_is_left_out_with_a_warning(
    error: Exception, device: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(monkeypatch, onnxruntime=Seconds(1, 1), openvino=error)
    assert [choose(device, 40, BOTH) for _ in range(2)] == ["onnxruntime"] * 2
    assert len(asked) == 2  # it is not tried again
    assert f"openvino is left out: {error or 'MemoryError'}" in capsys.readouterr().err
    cache.unlink()
    pretend(monkeypatch, onnxruntime=error, openvino=error)
    assert choose(device, 40, BOTH) == "onnxruntime"  # drawing will say what is wrong


def test_measurement_is_of_this_artifact_and_has_a_deadline(handmade_device: Artifact, tmp_path: Path) -> None:
    load, step = measure(handmade_device, "onnxruntime", 60)
    assert load >= 0 and 0 < step < 60
    with pytest.raises(MachineError, match=r"onnxruntime cannot be measured: no step was done in 0.0 s"):
        measure(handmade_device, "onnxruntime", 0.01)
    with pytest.raises(MachineError, match=r"cannot be measured: no artifact at "):
        measure(dataclasses.replace(handmade_device, path=tmp_path / "none"), "onnxruntime", 60)


class Failing(OnnxRuntimeNetwork):
    """Stands for OpenVINO, which need not be installed: it fails when it loads (True), or when it runs."""

    when_loading = True
    error: ClassVar[Exception] = RuntimeError("no such\ninstruction")

    def __init__(self, *options: Any) -> None:
        if self.when_loading:
            raise self.error
        super().__init__(*options)

    def run(self, *_: Any) -> Any:
        raise self.error


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    class Engine(Failing):
        pass

    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    monkeypatch.setattr(engine, "NETWORKS", engine.NETWORKS | {"openvino": Engine})
    return Engine


@pytest.mark.parametrize("when_loading", [True, False])
def test_onnxruntime_continues_when_the_chosen_engine_fails(
    when_loading: bool, handmade_device: Artifact, failing: type[Failing], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.when_loading = when_loading
    found = DevicePipeline(handmade_device, engine="openvino", falls_back=True).sample(["a red circle"], [1])
    assert capsys.readouterr().err.count("openvino failed in transformer (no such instruction); onnxruntime continues") == 1
    np.testing.assert_array_equal(found, DevicePipeline(handmade_device).sample(["a red circle"], [1]))


def test_a_failure_of_the_engine_that_was_asked_for_is_an_error(handmade_device: Artifact, failing: type[Failing]) -> None:
    with pytest.raises(ArtifactError, match=r"openvino failed in transformer of .* \(no such instruction\)"):
        Engine(handmade_device, name="openvino").network("transformer")
    failing.error = MemoryError()
    with pytest.raises(MachineError, match=r"transformer ran out of memory \(MemoryError\); use a smaller --batch, or --memory"):
        Engine(handmade_device, name="openvino").network("transformer")
