"""Engines by name: what is unknown, not installed or without a device ends in one sentence before any network is loaded."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnxruntime as ort
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import engine, providers
from flashgen.device.providers import PROBE, PROVIDERS, Provider, Target, require, session_on, target_of
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import MachineError, UsageError


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> str:
    """A provider that every onnxruntime of Linux has, and that computes nothing: it leaves all operators to the processor."""
    name = "AzureExecutionProvider"
    if name not in ort.get_available_providers():
        pytest.skip("this onnxruntime was built without it")
    monkeypatch.setattr(providers, "PROVIDERS", {**PROVIDERS, "azure": Provider(name, "")})
    monkeypatch.setattr(engine, "PROVIDERS", providers.PROVIDERS)
    return "onnxruntime:azure"


def test_names_of_engines_and_of_what_is_none() -> None:
    assert target_of("onnxruntime:cuda") == Target("onnxruntime", "cuda") and str(target_of("onnxruntime:cuda")) == "onnxruntime:cuda"
    assert target_of("openvino:CPU") == target_of("openvino") == Target("openvino") and target_of("openvino:GPU.1").where == "GPU.1"
    for name in ("tensorrt", "onnxruntime:GPU", "onnxruntime:", "openvino:cuda", "openvino:gpu", ""):
        if name != "onnxruntime:":
            with pytest.raises(UsageError, match=rf"--engine {name} is unknown; use one of: onnxruntime, onnxruntime:cuda, .*openvino:NPU"):
                target_of(name)


def test_an_engine_that_is_not_installed_is_one_sentence(handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: None if name == "openvino" else name)
    require.cache_clear()
    with pytest.raises(
        MachineError, match=r"--engine openvino needs openvino, which is not installed: pip install \"flashgen\[openvino\]\""
    ):
        DevicePipeline(handmade_device, engine="openvino")


@pytest.mark.parametrize("where", PROVIDERS)
def test_a_provider_that_is_not_here_names_its_package_and_what_is_here(where: str, handmade_device: Artifact) -> None:
    if PROVIDERS[where].name in ort.get_available_providers():
        pytest.skip("this machine has it")
    message = (
        rf"--engine onnxruntime:{where} cannot compute here \(.*\); there is .*CPUExecutionProvider; {re.escape(PROVIDERS[where].install)}"
    )
    with pytest.raises(MachineError, match=message):
        DevicePipeline(handmade_device, engine=f"onnxruntime:{where}")


def test_a_provider_without_a_device_is_refused(azure: str, handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package may bring a provider whose device, or driver, is missing: onnxruntime then opens sessions on the processor."""
    require.cache_clear()
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: [providers.CPU])
    with pytest.raises(MachineError, match=r"--engine onnxruntime:azure cannot compute here \(AzureExecutionProvider has no device here\)"):
        DevicePipeline(handmade_device, engine=azure)


def test_openvino_without_the_device_names_those_that_are_here(handmade_device: Artifact) -> None:
    openvino = pytest.importorskip("openvino")
    if "NPU" in openvino.Core().available_devices:
        pytest.skip("this machine has one")
    with pytest.raises(MachineError, match=r"--engine openvino:NPU: OpenVINO has no such device here, only .*CPU"):
        DevicePipeline(handmade_device, engine="openvino:NPU")


def test_probe_is_a_model_that_adds() -> None:
    model = ir.from_proto(__import__("onnx").load_model_from_string(PROBE))
    assert [node.op_type for node in model.graph] == ["Add"]
    assert session_on(PROBE, ort.SessionOptions(), None).get_providers() == [providers.CPU]


def test_operators_that_a_provider_leaves_to_the_processor_are_named(
    azure: str, handmade_device: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    require.cache_clear()
    pictures = [DevicePipeline(handmade_device, engine=name).sample(["a red circle"], [1]) for name in (azure, "onnxruntime")]
    assert (pictures[0] == pictures[1]).all()
    said = capsys.readouterr().err
    assert re.search(r"onnxruntime:azure leaves operators of transformer to the processor: \d+ \w+, ", said)
    assert "subject_encoder" not in said  # text encoders stay on the processor


def test_a_network_for_fixed_shapes_knows_its_sizes(handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """As QNN and NPUs need it; another batch is another network."""
    monkeypatch.setattr(engine, "FIXED", ("",))
    pipeline = DevicePipeline(handmade_device)
    pictures = pipeline.sample(["a red circle", "two blue squares", "a square"], [1, 2, 3], batch=2)
    assert (pictures == DevicePipeline(handmade_device).sample(["a red circle", "two blue squares", "a square"], [1, 2, 3], batch=2)).all()
    feeds = pipeline.graph.zero_feeds(pipeline.engine.network("transformer").inputs)
    assert pipeline.engine.network("transformer", feeds).inputs == {name: [*value.shape] for name, value in feeds.items()}
