"""A description is checked before anything is computed by it, since it may come from a stranger."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.artifact.store import Artifact
from flashgen.device.graph import Extent, Graph, pack, read_graph, unpack
from flashgen.errors import ArtifactError
from tests.device.handmade import DESCRIPTION, NUMBERS, TOKENS, WIDTH, publish


def nested(depth: int) -> Any:
    expression: Any = "subject"
    for _ in range(depth - 1):
        expression = {"pad": expression, "to": WIDTH}
    return expression


def changed(path: str, value: Any) -> dict[str, Any]:
    """`DESCRIPTION` with the entry at `path` replaced; ... removes it."""
    graph: Any = copy.deepcopy(DESCRIPTION)
    *parts, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    place = graph
    for part in parts:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return graph  # type: ignore[no-any-return]


FAULTS: dict[str, tuple[str, Any, str]] = {
    "unknown key": ("vae.strange", 1, "graph.vae.strange"),
    "missing key": ("transformer.patch", ..., "graph.transformer.patch"),
    "no encoder": ("encoders", [], "graph.encoders"),
    "too many encoders": ("encoders", DESCRIPTION["encoders"] * 5, "graph.encoders"),
    "text for a number": ("encoders.0.length", "6", "graph.encoders.0.length"),
    "absurd length": ("encoders.0.length", 1 << 40, "graph.encoders.0.length"),
    "negative padding id": ("encoders.0.pad_id", -1, "graph.encoders.0.pad_id"),
    "path out of the artifact": ("encoders.0.component", "../other", "graph.encoders.0.component"),
    "absolute path": ("encoders.0.tokenizer", "/etc", "graph.encoders.0.tokenizer"),
    "component without files": ("encoders.0.component", "other", "describes other/model.onnx, but does not list it"),
    "tokenizer without files": ("encoders.0.tokenizer", "other", "describes other/tokenizer.json, but does not list it"),
    "no outputs": ("encoders.0.outputs", {}, "graph.encoders.0.outputs"),
    "one name for two values": ("encoders.1.outputs", {"subject": "states"}, "two encoder outputs have one name"),
    "unknown value": ("conditioning.text", "nothing", "no encoder gives 'nothing'"),
    "unknown value within": ("conditioning.text", {"pad": "nothing", "to": 9}, "no encoder gives 'nothing'"),
    "unknown operation": ("conditioning.text", {"repeat": "subject"}, "is no expression"),
    "second operation": ("conditioning.text", {"pad": "subject", "to": 9, "axis": 1}, "is no expression"),
    "number for an expression": ("conditioning.text", 3, "is no expression"),
    "empty concat": ("conditioning.text", {"concat": [], "axis": 1}, "is no expression"),
    "concat of the batch": ("conditioning.text", {"concat": ["subject"], "axis": 0}, "is no expression"),
    "axis that is no number": ("conditioning.text", {"concat": ["subject"], "axis": True}, "is no expression"),
    "zeros of one size": ("conditioning.text", {"zeros": [2]}, "is no expression"),
    "zeros of a negative size": ("conditioning.text", {"zeros": [-1, 2]}, "is no expression"),
    "absurd zeros": ("conditioning.text", {"zeros": [1 << 20, 1 << 20]}, "the limit is"),
    "absurd padding": ("conditioning.text", {"pad": "subject", "to": 1 << 40}, "the limit is"),
    "deep expression": ("conditioning.text", nested(9), "nested more than 8 deep"),
    "endless expression": ("conditioning.text", nested(500), "nested more than 8 deep"),
    "conditioning named as the latents": ("conditioning.image", "subject", "conditioning names the transformer's latents"),
    "infinite scale": ("transformer.timestep_scale", float("inf"), "graph.transformer.timestep_scale"),
    "no scaling factor": ("vae.scaling_factor", 0.0, "graph.vae.scaling_factor"),
    "squares that do not fit": ("transformer.patch", 5, "cannot be cut into squares of 5"),
    "latents without a side": ("latent_shape", [4, 16], "graph.latent_shape"),
    "absurd latents": ("latent_shape", [1 << 14, 1 << 14, 1 << 14], "too large"),
    "latents of another size": ("latent_shape", [4, 24, 16], "latents give 64x96 px, the sampler 96x64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_description_is_one_sentence(fault: str, handmade_device: Artifact) -> None:
    path, value, message = FAULTS[fault]
    extra = {"graph": changed(path, value)}
    broken = Artifact(handmade_device.path, handmade_device.manifest.model_copy(update={"extra": extra}))
    with pytest.raises(ArtifactError) as caught:
        read_graph(broken)
    text = str(caught.value)
    assert message in text and text.endswith("export the student again with: flashgen export") and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("graph", [None, [], 3, {}])
def test_description_that_is_no_mapping_is_one_sentence(graph: Any, handmade_device: Artifact) -> None:
    broken = Artifact(handmade_device.path, handmade_device.manifest.model_copy(update={"extra": {"graph": graph}}))
    with pytest.raises(ArtifactError, match=r"graph.*flashgen export"):
        read_graph(broken)


def test_old_artifact_with_broken_configs_is_one_sentence(handmade_device: Artifact) -> None:
    """Without a description its family reads the configs; those of an unknown family cannot be read."""
    changes = {"extra": {"tokenizers": {"words": {}}}, "family": "sd3"}
    old = Artifact(handmade_device.path, handmade_device.manifest.model_copy(update=changes))
    with pytest.raises(ArtifactError, match=r"are broken \(KeyError\('pad_id'\)\); export the student again"):
        read_graph(old)
    with pytest.raises(ArtifactError, match="model family 'handmade' is not known here"):
        read_graph(Artifact(handmade_device.path, handmade_device.manifest.model_copy(update={"extra": {}})))


def test_nested_expressions_are_evaluated_up_to_the_limit(tmp_path: Path) -> None:
    graph = read_graph(publish(tmp_path / "nested", changed("conditioning.text", nested(8))))
    assert graph.extent("text") == Extent(6, WIDTH)


def test_expressions_concatenate_pad_and_make_zeros() -> None:
    graph = Graph.model_validate(DESCRIPTION)
    values = {
        "subject": np.full((2, 6, 8), 1, np.float32),
        "style": np.full((2, 4, 4), 2, np.float32),
        "gist": np.full((2, 8), 3, np.float32),
        "subject_mask": np.ones((2, 6), np.float32),
        "style_mask": np.zeros((2, 4), np.float32),
    }
    found = graph.condition(values, 2)
    assert {name: value.shape for name, value in found.items()} == {
        "text": (2, 10, 8),
        "text_mask": (2, 10),
        "summary": (2, 18),
        "extra": (2, 2, 8),
    }
    assert all(value.dtype == np.float32 for value in found.values())
    np.testing.assert_array_equal(found["text"][1, 5:7], [[1] * 8, [2] * 4 + [0] * 4])
    np.testing.assert_array_equal(found["text_mask"][0], [1] * 6 + [0] * 4)
    np.testing.assert_array_equal(found["summary"][0], [3] * 16 + [0] * 2)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_packing_is_undone_and_channel_major(patch: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 12)).astype(np.float32)
    tokens = pack(x, patch)
    assert tokens.shape == (2, 8 * 12 // patch**2, 3 * patch**2)
    np.testing.assert_array_equal(unpack(tokens, patch, 8, 12), x)
    second = x[1, :, :patch, patch : 2 * patch]  # the square to the right of the first one
    np.testing.assert_array_equal(tokens[1, 1], second.reshape(-1))


def test_zero_feeds_have_the_shapes_of_one_picture() -> None:
    graph = Graph.model_validate(DESCRIPTION)
    shapes: dict[str, list[int | None]] = {
        "image": [None, TOKENS, NUMBERS],
        "time": [None],
        "text": [None, None, WIDTH],
        "text_mask": [None, None],
    }
    feeds = graph.zero_feeds(shapes | {"summary": [None, 18], "extra": [1, 2, WIDTH]})
    want = {
        "image": (1, TOKENS, NUMBERS),
        "time": (1,),
        "text": (1, 10, WIDTH),
        "text_mask": (1, 10),
        "summary": (1, 18),
        "extra": (1, 2, WIDTH),
    }
    assert {name: feed.shape for name, feed in feeds.items()} == want


def test_timestep_and_output_are_scaled() -> None:
    graph = Graph.model_validate(DESCRIPTION)
    x = np.random.default_rng(0).standard_normal((2, 4, 16, 24)).astype(np.float32)
    feeds = graph.feeds(x, 0.75, {})
    np.testing.assert_array_equal(feeds["time"], np.array([2, 2], np.float32))  # 2 * 0.75 + 0.5
    np.testing.assert_array_equal(graph.velocity(feeds["image"]), -x)
