"""`--engine auto` measures once and counts what loading takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import choice
from flashgen.device.choice import Seconds, choose, measure


def test_the_only_engine_is_taken_without_measuring(tiny_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(choice, "measure", None)
    assert choose(tiny_device, 4) == "onnxruntime"


def test_auto_measures_once_and_takes_what_is_done_first(
    tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    seconds = {"onnxruntime": Seconds(0.1, 0.2), "openvino": Seconds(0.4, 0.1)}

    def pretend(artifact: Artifact, name: str) -> Seconds:
        asked.append(name)
        return seconds[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    monkeypatch.setattr(choice, "measure", pretend)
    # Of two steps the one is done before the other has loaded.
    assert [choose(tiny_device, steps) for steps in (4, 4, 2)] == [
        "openvino",
        "openvino",
        "onnxruntime",
    ]
    assert asked == ["onnxruntime", "openvino"]
    assert "engine: openvino for 4 steps (onnxruntime 0.1 s to load and 200 ms a step, openvino 0.4 s" in capsys.readouterr().err
    file = tmp_path / "flashgen" / "engines.json"
    for strange in ("{", "[]", '{"a": 3}', '{"a": {"onnxruntime": 0.2}}'):  # of a stranger, or of an older flashgen
        file.write_text(strange)
        assert choose(tiny_device, 4) == "openvino"
    assert list(json.loads(file.read_text()).values()) == [{"onnxruntime": [0.1, 0.2], "openvino": [0.4, 0.1]}]


def test_a_measurement_is_of_this_artifact(tiny_device: Artifact) -> None:
    load, step = measure(tiny_device, "onnxruntime")
    assert 0 < load < 10 and 0 < step < 10
