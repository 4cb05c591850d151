"""`--engine auto` learns from jobs, tries an engine once where that can pay, and survives engines that fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from flashgen.artifact.manifest import File
from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device import choice, engine
from flashgen.device.choice import Seconds, choose, installed, kind_of, known_seconds, learn
from flashgen.device.engine import Engine, OnnxRuntimeNetwork
from flashgen.device.providers import Choice, Spent
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, MachineError
from flashgen.runtime.processor import Processor

BOTH = ["onnxruntime", "openvino"]
JOB = 4  # steps
OLD = Path(__file__).parents[1] / "fixtures" / "v0.2"


@pytest.fixture
def device(handmade_device: Artifact) -> Artifact:
    """An artifact whose transformer seems to have 1.3 GB, as SD3.5-Medium's in INT4 has."""
    large = File(path="transformer/model.onnx_data", size=1_300_000_000, sha256="0" * 64)
    manifest = handmade_device.manifest
    return dataclasses.replace(handmade_device, manifest=manifest.model_copy(update={"files": [*manifest.files, large]}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flashgen" / "engines.json"


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """The table of ratios, empty, for a processor of kind vnni."""
    table: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(choice, "RATIOS", table)
    monkeypatch.setattr(choice, "this_processor", lambda: Processor("test", ("avx512_vnni",)))
    return table


def job(load: float, *steps: float, rows: int = 1) -> Spent:
    return Spent([load], [*steps], [rows] * len(steps))


def test_the_only_engine_is_taken(device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "openvino" else name)
    assert choose(device, JOB, installed(device)) == Choice("onnxruntime")


def test_auto_tries_the_other_engine_once_and_takes_the_one_that_finishes_first(
    device: Artifact, ratio: dict[Any, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(device, JOB, BOTH) == Choice("onnxruntime")
    learn(device, {"onnxruntime": job(3, 10, 10, 10, 10)})
    assert choose(device, JOB, BOTH) == Choice("openvino", "onnxruntime", 43)  # stopped after what onnxruntime takes for the job
    learn(device, {"openvino": job(9, 15, 5, 5, 5)})  # compiled: 9 s of loading, and 10 of the first step, count from the second job on
    assert choose(device, JOB, BOTH) == Choice("openvino", "onnxruntime")
    said = capsys.readouterr().err
    assert "engine: onnxruntime for 4 steps (not measured yet" in said
    assert "engine: openvino, for the first time here (onnxruntime 3.0 s to load and 10000 ms per step; --engine decides" in said
    learn(device, {"openvino": job(40, 5, 5, 5, 5)})  # a busy moment does no harm: the least of each counts
    assert known_seconds(device)["openvino"] == Seconds(19, 5, 2)
    assert [choose(device, steps, BOTH).name for steps in (1, 4)] == ["onnxruntime", "openvino"]


@pytest.mark.parametrize(
    ("features", "level", "tried"),
    [
        (("avx512_vnni", "avx512_bf16"), 4, True),
        (("amx_int8", "amx_bf16"), 4, True),
        (("avx512_vnni",), 4, False),  # 8-bit activations are what OpenVINO does there
        (("avx2", "avx512_bf16"), 4, False),
        (("amx_int8", "amx_bf16"), 0, False),  # the artifact computes in fp32
    ],
)
def test_auto_compares_bf16_with_8_bit_activations_where_both_can_be_had(
    features: tuple[str, ...], level: int, tried: bool, device: Artifact, ratio: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "this_processor", lambda: Processor("test", features))
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    extra = device.manifest.extra | {"accuracy_level": level}
    rounded = dataclasses.replace(device, manifest=device.manifest.model_copy(update={"extra": extra}))
    names = installed(rounded)
    assert names == [*BOTH, *["openvino:int8"] * tried]
    learn(rounded, {"onnxruntime": job(3, 10, 10, 10, 10)})
    assert choose(rounded, JOB, names).name == "openvino"
    learn(rounded, {"openvino": job(3, 5, 5, 5, 5)})
    if tried:
        assert choose(rounded, JOB, names) == Choice("openvino:int8", "openvino", 23)
        learn(rounded, {"openvino:int8": job(3, 4, 4, 4, 4)})
    assert choose(rounded, JOB, names).name == names[-1]


def test_seconds_are_per_row_and_without_what_the_first_step_prepares(device: Artifact) -> None:
    learn(
        device, {"onnxruntime": Spent([2.0, 3.0], [9.0, 4.0, 4.0, 2.0], [2, 2, 2, 1]), "openvino": job(1.0), "onnxruntime:cuda": job(1, 1)}
    )
    assert known_seconds(device) == {"onnxruntime": Seconds(2 + 5, 2, 1)}


def test_an_engine_that_ended_the_process_is_not_tried_again(device: Artifact, ratio: dict[Any, float], cache: Path) -> None:
    learn(device, {"onnxruntime": job(3, 10, 10)})
    assert choose(device, JOB, BOTH).name == "openvino"
    assert [choose(device, JOB, BOTH).name for _ in range(2)] == ["onnxruntime"] * 2
    known = next(iter(json.loads(cache.read_text()).values()))
    for strange in ("{", "[]", json.dumps({key: 3 for key in json.loads(cache.read_text())}), json.dumps({"a": known})):
        cache.write_text(strange)
        assert known_seconds(device) == {} and choose(device, JOB, BOTH) == Choice("onnxruntime")
        learn(device, {"onnxruntime": job(3, 10, 10)})
        assert known_seconds(device) == {"onnxruntime": Seconds(3, 10, 1)}


def test_no_engine_is_tried_where_that_cannot_pay(
    device: Artifact, handmade_device: Artifact, ratio: dict[Any, float], cache: Path
) -> None:
    """Half of a job must take longer than importing and compiling, and no measurement may say that the other engine is slower."""
    learn(handmade_device, {"onnxruntime": job(0.1, 0.1, 0.1)})
    assert choose(handmade_device, JOB, BOTH).name == "onnxruntime"
    assert choose(handmade_device, 1000, BOTH).name == "openvino"  # many pictures win the start of an engine back
    cache.unlink()
    learn(device, {"onnxruntime": job(1, 1, 1)})
    ratio["vnni", "fp32"] = 1.4
    assert choose(device, 1000, BOTH).name == "onnxruntime"
    ratio["vnni", "fp32"] = 0.95
    assert [choose(device, steps, BOTH).name for steps in (JOB, 1000)] == BOTH


def test_a_ratio_that_was_measured_chooses_the_first_engine_and_names_one_that_is_missing(
    device: Artifact,
    handmade_device: Artifact,
    ratio: dict[Any, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ratio["vnni", "fp32"] = 0.5
    assert choose(device, JOB, BOTH) == Choice("openvino", "onnxruntime")
    assert choose(handmade_device, JOB, BOTH) == Choice("onnxruntime")  # kilobytes
    learn(device, {"openvino": job(3, 5, 5)})
    assert choose(device, JOB, BOTH).name == "openvino"  # onnxruntime would take twice as long: it is not tried
    monkeypatch.setattr(choice, "find_spec", lambda name: None if name == "openvino" else name)
    capsys.readouterr()
    assert choose(device, JOB, installed(device)) == Choice("onnxruntime")
    assert "openvino would do a step about 2.0 times as fast here: pip install 'flashgen[openvino]'" in capsys.readouterr().err
    for changed in (0.95, None):
        ratio.clear()
        ratio.update({("vnni", "fp32"): changed} if changed else {})
        choose(device, JOB, installed(device))
    choose(handmade_device, JOB, installed(handmade_device))
    assert "times as fast" not in capsys.readouterr().err  # no number where nothing was measured, or nothing gained


def test_kinds_of_artifacts_are_those_of_the_table(handmade_device: Artifact) -> None:
    old, quantized = (open_artifact(OLD / name) for name in ("device-student/v0001", "device-quantized/v0001"))
    rounded = quantized.manifest.model_copy(update={"extra": quantized.manifest.extra | {"accuracy_level": 4}})
    artifacts = [handmade_device, old, quantized, dataclasses.replace(quantized, manifest=rounded)]
    assert [kind_of(artifact) for artifact in artifacts] == ["fp32", "fp32", "int4", "int4 rounded"]
    assert kind_of(dataclasses.replace(quantized, path=OLD)) == "fp32"
    assert {kind for _, kind in choice.RATIOS} <= {"fp32", "int4", "int4 rounded", "int8", "static int8"}


def test_a_job_is_learnt_from_and_an_engine_that_uses_up_its_time_is_left(
    handmade_device: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = DevicePipeline(handmade_device, engine=Choice("onnxruntime", "onnxruntime", 0.0))
    picture = pipeline.sample(["a red circle"], [1])
    assert np.array_equal(picture, DevicePipeline(handmade_device).sample(["a red circle"], [1]))
    assert "onnxruntime is slower than onnxruntime, which continues" in capsys.readouterr().err
    spent = pipeline.engine.spent["onnxruntime"]
    assert len(spent.loads_s) == 2 and len(spent.steps_s) == len(handmade_device.manifest.sampler.sigmas) - 1  # type: ignore[union-attr]  # an export has a sampler
    learn(handmade_device, pipeline.engine.spent)
    known = known_seconds(handmade_device)["onnxruntime"]
    assert known is not None and 0 < known.step < 60


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

    monkeypatch.setattr(engine, "require", lambda target: None)
    monkeypatch.setattr(engine, "NETWORKS", engine.NETWORKS | {"openvino": Engine})
    return Engine


@pytest.mark.parametrize("when_loading", [True, False])
def test_onnxruntime_continues_when_the_chosen_engine_fails(
    when_loading: bool, handmade_device: Artifact, failing: type[Failing], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.when_loading = when_loading
    found = DevicePipeline(handmade_device, engine=Choice("openvino", "onnxruntime")).sample(["a red circle"], [1])
    assert capsys.readouterr().err.count("openvino failed in transformer (no such instruction); onnxruntime continues") == 1
    np.testing.assert_array_equal(found, DevicePipeline(handmade_device).sample(["a red circle"], [1]))


def test_a_failure_of_the_engine_that_was_asked_for_is_an_error(handmade_device: Artifact, failing: type[Failing]) -> None:
    with pytest.raises(ArtifactError, match=r"openvino failed in transformer of .* \(no such instruction\)"):
        Engine(handmade_device, name="openvino").network("transformer")
    failing.error = MemoryError()
    with pytest.raises(MachineError, match=r"transformer ran out of memory \(MemoryError\); use a smaller --batch, or --memory"):
        Engine(handmade_device, name="openvino").network("transformer")
