"""`--engine auto` measures once and counts what loading takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import choice
from flashgen.device.choice import Seconds, choose, installed, measure
from flashgen.errors import ArtifactError

BOTH = ["onnxruntime", "openvino"]


def test_the_only_engine_is_taken_without_measuring(tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(choice, "measure", None)
    assert choose(tiny_device, 4, installed()) == "onnxruntime"


def test_auto_measures_once_and_takes_what_is_done_first(
    tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    seconds = {"onnxruntime": Seconds(0.1, 0.2), "openvino": Seconds(0.4, 0.1)}

    def pretend(artifact: Artifact, name: str) -> Seconds:
        asked.append(name)
        return seconds[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure", pretend)
    # Of two steps the one is done before the other has loaded.
    assert [choose(tiny_device, steps, BOTH) for steps in (4, 4, 2)] == [
        "openvino",
        "openvino",
        "onnxruntime",
    ]
    assert asked == ["onnxruntime", "openvino"]
    assert "engine: openvino for 4 steps (onnxruntime 0.1 s to load and 200 ms a step, openvino 0.4 s" in capsys.readouterr().err
    file = tmp_path / "flashgen" / "engines.json"
    key = next(iter(json.loads(file.read_text())))
    # Of a stranger, or of an older flashgen.
    for strange in ("{", "[]", json.dumps({key: {}}), json.dumps({key: 3}), '{"a": {"onnxruntime": 0.2}}'):
        file.write_text(strange)
        assert choose(tiny_device, 4, BOTH) == "openvino"
    assert list(json.loads(file.read_text()).values()) == [{"onnxruntime": [0.1, 0.2], "openvino": [0.4, 0.1]}]


def test_a_measurement_is_of_this_artifact(tiny_device: Artifact) -> None:
    load, step = measure(tiny_device, "onnxruntime")
    assert load >= 0 and 0 < step < 60
    wrong = tiny_device.manifest.model_copy(update={"extra": tiny_device.manifest.extra | {"latent_shape": [16, 6, 6]}})
    with pytest.raises(Exception, match="hidden_states"):
        measure(dataclasses.replace(tiny_device, manifest=wrong), "onnxruntime")


def test_an_engine_that_cannot_load_it_is_left_out(tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(artifact: Artifact, name: str) -> Seconds:
        if name in broken:
            raise ArtifactError(f"{name} cannot load it")
        return Seconds(1, 1)

    broken = ["onnxruntime"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure", pretend)
    assert choose(tiny_device, 4, BOTH) == "openvino"
    (tmp_path / "flashgen" / "engines.json").unlink()
    broken = BOTH
    with pytest.raises(ArtifactError, match="runs on none of onnxruntime, openvino"):
        choose(tiny_device, 4, BOTH)
