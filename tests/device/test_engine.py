"""Which engine runs an exported network, and that each draws the same picture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import engine
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, UsageError

PROMPT = ["two red circles on a white background"]


def test_an_engine_that_is_not_installed_is_one_sentence(tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(UsageError, match=r"--engine openvino is not installed; install it with: pip install 'flashgen\[openvino\]'"):
        DevicePipeline(tiny_device, engine="openvino")
    assert DevicePipeline(tiny_device, engine="auto").engine.name == "onnxruntime"


def test_auto_measures_once_and_takes_the_fastest(
    tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def seconds(name: str, model: Path, feeds: object, threads: int | None) -> float:
        asked.append(name)
        return {"onnxruntime": 0.2, "openvino": 0.1}[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    monkeypatch.setattr(engine, "_step_seconds", seconds)
    for _ in range(2):
        assert DevicePipeline(tiny_device, engine="auto").engine.name == "openvino"
    assert asked == ["onnxruntime", "openvino"]
    assert "engine: openvino (a step here: onnxruntime 200 ms, openvino 100 ms; --engine decides otherwise)" in capsys.readouterr().err
    (tmp_path / "flashgen" / "engines.json").write_text("{")  # of a stranger
    assert DevicePipeline(tiny_device, engine="auto").engine.name == "openvino"
    assert list(json.loads((tmp_path / "flashgen" / "engines.json").read_text()).values()) == [{"onnxruntime": 0.2, "openvino": 0.1}]


def test_one_step_of_zeros_fits_the_transformer(tiny_device: Artifact) -> None:
    pipeline = DevicePipeline(tiny_device)
    seconds = engine._step_seconds("onnxruntime", tiny_device.path / "transformer" / "model.onnx", pipeline._one_step(tiny_device.path), 1)
    assert 0 < seconds < 10


def test_openvino_draws_what_onnxruntime_draws(tiny_int4_device: Artifact) -> None:
    pytest.importorskip("openvino")
    one, other = (DevicePipeline(tiny_int4_device, engine=name).sample(PROMPT, [3]).astype(float) for name in ("onnxruntime", "openvino"))
    assert 20 * np.log10(255 / np.sqrt(np.mean((one - other) ** 2))) > 30  # bf16 in the transformer, where the processor has it


def test_a_broken_graph_is_an_artifact_error_of_either_engine(tiny_device: Artifact, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.onnx").write_bytes(b"nothing")
    for name in engine.NETWORKS:
        if find_spec(name):
            with pytest.raises(ArtifactError, match=f"{name} cannot load .*model.onnx"):
                engine.Engine(tmp_path, name=name).network("transformer")
