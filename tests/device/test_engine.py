"""Each engine draws the same picture, from files that are the manifest's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device import engine
from flashgen.device.providers import session_on
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, MachineError, NumericsError
from flashgen.recipe.compression import ExportRecipe
from flashgen.recipe.schema import Recipe

PROMPT = ["two red circles"]


@pytest.mark.parametrize(("level", "floor_db"), [(0, 60), (4, 25)])
def test_openvino_draws_what_onnxruntime_draws(tiny_quantized: Artifact, tmp_path: Path, level: int, floor_db: float) -> None:
    """In fp32, but where the artifact allows rounded activations, and bf16 with them."""
    pytest.importorskip("openvino")
    from tests import runs

    recipe = Recipe(name="test", export=ExportRecipe(accuracy_level=level, psnr_floor_int8_db=1))
    device = runs.export(str(tiny_quantized.path), tmp_path / "device", recipe, 0, False)
    one, other = (DevicePipeline(device, engine=name).sample(PROMPT, [3]).astype(float) for name in ("onnxruntime", "openvino"))
    assert 20 * np.log10(255 / (np.sqrt(np.mean((one - other) ** 2)) or 1e-9)) > floor_db


def test_openvino_follows_any_description(handmade_device: Artifact) -> None:
    pytest.importorskip("openvino")
    one, other = (DevicePipeline(handmade_device, engine=name).sample(PROMPT, [3]).astype(int) for name in ("onnxruntime", "openvino"))
    assert np.abs(one - other).max() <= 1
    inputs = [engine.Engine(handmade_device, name=name).network("transformer").inputs for name in ("onnxruntime", "openvino")]
    assert inputs[0] == inputs[1] and inputs[0]["text"] == [None, None, 8]


def test_what_openvino_compiles_is_kept_and_a_broken_copy_is_made_again(
    handmade_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = []
    for _ in range(3):
        pictures.append(DevicePipeline(handmade_device, engine="openvino").sample(PROMPT, [3]))
        blobs = [path for path in (tmp_path / "flashgen" / "openvino").rglob("*") if path.is_file()]
        assert len(blobs) == 2 and all(path.stat().st_size > 1000 for path in blobs)  # transformer and decoder
        if len(pictures) == 2:
            for blob in blobs:
                blob.chmod(0o600)
                blob.write_bytes(b"half of it")
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])


def test_compiled_components_are_few_and_a_cache_that_cannot_be_written_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [engine.compiled(f"{number:016x}") for number in range(engine.COMPILED + 3)]
    there = {path.name for path in (tmp_path / "flashgen" / "openvino").iterdir()}
    assert len(there) == engine.COMPILED and folders[-1] is not None and folders[-1].name in there
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert engine.compiled("0") is None


def copied(artifact: Artifact, path: Path) -> Artifact:
    shutil.copytree(artifact.path, path)
    return dataclasses.replace(artifact, path=path)


def test_a_broken_graph_is_an_artifact_error_of_either_engine(
    handmade_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copied(handmade_device, tmp_path / "broken")
    (broken.path / "transformer" / "model.onnx").write_bytes(b"nothing")
    for name in engine.NETWORKS:
        if find_spec(name):
            with pytest.raises(ArtifactError, match=f"{name} cannot load .*model.onnx"):
                engine.NETWORKS[name](broken.path / "transformer" / "model.onnx")


def test_a_graph_of_another_artifact_is_not_run(handmade_device: Artifact, tmp_path: Path) -> None:
    mixed = copied(handmade_device, tmp_path / "mixed")
    path = mixed.path / "style_encoder" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # the same size
    path.write_bytes(data)
    pipeline = DevicePipeline(mixed)
    pipeline.engine.network("transformer")
    with pytest.raises(ArtifactError, match=r"style_encoder/model.onnx was altered or comes from another artifact"):
        pipeline.sample(PROMPT, [3])


def test_a_graph_that_the_manifest_does_not_name_is_not_run(handmade_device: Artifact, tmp_path: Path) -> None:
    foreign = copied(handmade_device, tmp_path / "foreign")
    shutil.copytree(foreign.path / "transformer", foreign.path / "upscaler")
    with pytest.raises(ArtifactError, match="its manifest names no upscaler"):
        engine.Engine(foreign).network("upscaler")


@pytest.mark.parametrize("where", ["../secret", "{root}/secret", "/dev/zero"])
@pytest.mark.parametrize("name", [name for name in engine.NETWORKS if find_spec(name)])
def test_weights_outside_of_the_artifact_are_not_read(name: str, where: str, tmp_path: Path) -> None:
    """The engines themselves refuse external data that leaves the model's folder; a version holds no links."""
    onnx = pytest.importorskip("onnx")
    np.zeros(4, np.float32).tofile(tmp_path / "secret")
    (tmp_path / "transformer").mkdir()
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=where.format(root=tmp_path))
    tensor.external_data.add(key="length", value="16")
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "graph", [x], [y], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "transformer" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=f"{name} cannot load .*model.onnx"):
        engine.NETWORKS[name](tmp_path / "transformer" / "model.onnx")


@pytest.mark.parametrize("component", ["style_encoder", "transformer", "vae_decoder"])
def test_a_network_that_gives_nan_is_named(component: str, handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    run, load = engine.OnnxRuntimeNetwork.run, engine.Engine._load

    def poisoned(self: engine.Engine, name: str, shapes: Any) -> Any:
        network: Any = load(self, name, shapes)
        if name == component:
            network.run = lambda *arguments: [np.full_like(value, np.nan) for value in run(network, *arguments)]
        return network

    monkeypatch.setattr(engine.Engine, "_load", poisoned)
    with pytest.raises(NumericsError, match=f"^{component} of .* gives numbers that are not finite"):
        DevicePipeline(handmade_device).sample(["two red circles"], [3])


def test_a_tokenizer_with_swapped_ids_is_not_used(handmade_device: Artifact, tmp_path: Path) -> None:
    swapped = copied(handmade_device, tmp_path / "swapped")
    file = next(swapped.path.glob("*/tokenizer.json"))
    text = file.read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    pairs = ((a, b) for a in vocabulary for b in vocabulary if a < b and len(str(vocabulary[a])) == len(str(vocabulary[b])))
    a, b = (f"{json.dumps(word)}:{vocabulary[word]}" for word in next(pairs))
    plain = text.replace('": ', '":')
    assert a in plain and b in plain
    new = f"{a.rpartition(':')[0]}:{b.rpartition(':')[2]}", f"{b.rpartition(':')[0]}:{a.rpartition(':')[2]}"
    file.write_text(plain.replace(a, new[0], 1).replace(b, new[1], 1).ljust(len(text)))
    assert file.stat().st_size == (handmade_device.path / file.relative_to(swapped.path)).stat().st_size
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was altered"):
        DevicePipeline(swapped)


@pytest.mark.parametrize(("said", "entry"), [(False, "0"), (True, "1"), (None, "1"), (0, "1"), ([], "1")])
def test_weights_are_searched_unless_none_can_overflow(
    said: object, entry: str, handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 30 seconds at SD3.5-Medium's size. Artifacts of flashgen 0.2 do not say whether theirs can."""
    entries = list[str]()

    def opened(model: str, options: Any, provider: Any) -> Any:
        entries.append(options.get_session_config_entry("session.x64quantprecision"))
        return session_on(model, options, provider)

    monkeypatch.setattr(engine, "session_on", opened)
    extra = handmade_device.manifest.extra | ({} if said is None else {"overflows": said})
    artifact = dataclasses.replace(handmade_device, manifest=handmade_device.manifest.model_copy(update={"extra": extra}))
    engine.Engine(artifact).network("transformer")
    assert entries == [entry]


@pytest.mark.parametrize(("version", "draws"), [("1.23.2", False), ("1.9.0", False), ("1.24.1", True), ("2.0.0rc1", True)])
def test_too_old_an_onnxruntime_says_which_one_would_do(
    version: str, draws: bool, handmade_device: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    if draws:
        assert DevicePipeline(handmade_device).sample(["two red circles"], [3]).shape[0] == 1
    else:
        with pytest.raises(MachineError, match=rf"onnxruntime {version} is installed, .* need 1\.24 or newer: pip install -U onnxruntime"):
            DevicePipeline(handmade_device).sample(["two red circles"], [3])


def test_the_packages_bound_is_the_least_onnxruntime_that_draws() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert f"onnxruntime>={'.'.join(map(str, engine.LEAST_ONNXRUNTIME))}" in project["dependencies"]
