"""Pictures follow the description in the manifest, of whatever family it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen.artifact.store import Artifact, open_artifact
from flashgen.device.memory import Plan
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError
from tests.device import handmade
from tests.device.handmade import DESCRIPTION, PROMPTS, SIZE, pictures, publish

SCALES = [(1.02, 0.9), (0.97, 1.1), (1.0, 1.05), (0.9, 1.0)]


def assert_alike(found: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    assert found.shape == want.shape and found.dtype == np.uint8 and want.std() > 20
    assert np.abs(found.astype(int) - want).max() <= 1  # float32 sums against float64: neighbours where a value lies between them


def test_pictures_equal_numpy_when_no_family_is_known(handmade_device: Artifact) -> None:
    found = DevicePipeline(handmade_device).sample(PROMPTS, [3, 2**63 + 5])
    assert found.shape == (2, *SIZE, 3)
    assert_alike(found, pictures(PROMPTS, [3, 2**63 + 5]))
    assert np.abs(found[:1].astype(int) - pictures(PROMPTS[1:], [3])).max() > 20, "the prompt has no effect"


def test_guided_pictures_equal_numpy_when_there_is_a_negative_prompt(handmade_device: Artifact) -> None:
    found = DevicePipeline(handmade_device).sample(PROMPTS, [3, 4], guidance=3.0, negative="green square", batch=1)
    assert_alike(found, pictures(PROMPTS, [3, 4], weight=3.0, negative="green square"))


def test_init_picture_uses_the_scales_of_the_remaining_steps(tmp_path: Path) -> None:
    device = publish(tmp_path / "scaled", scales=SCALES)
    init = pictures(["green square"], [9])[0]
    found = DevicePipeline(device).sample(PROMPTS, [3, 4], init=init, sigmas=[0.75, 0.5, 0.0])
    assert_alike(found, pictures(PROMPTS, [3, 4], init=init, sigmas=[0.75, 0.5, 0.0], scales=SCALES[2:]))


def test_preview_shows_the_first_picture_of_each_batch_and_ends_with_it(handmade_device: Artifact) -> None:
    shown: list[tuple[int, Any]] = []
    found = DevicePipeline(handmade_device).sample(PROMPTS, [1, 2], batch=1, preview=lambda i, draw: shown.append((i, draw())))
    assert [step for step, _ in shown] == [0, 1, 2, 3] * 2
    np.testing.assert_array_equal([shown[3][1], shown[7][1]], found)  # the last step ends at x0


@pytest.mark.parametrize("tile", [6, 10, 20])
def test_tiles_and_batches_keep_the_picture_when_it_is_not_square(handmade_device: Artifact, tile: int) -> None:
    pipeline = DevicePipeline(handmade_device)
    whole = pipeline.sample(PROMPTS, [1, 2])
    for within in (Plan(1, 1, None, 0, ""), Plan(2, 1, tile, 0, ""), Plan(2, 2, tile, 0, "")):
        found = pipeline.sample(PROMPTS, [1, 2], within=within)
        assert np.abs(found.astype(int) - whole).max() <= 1  # this decoder has no context


def test_masks_are_one_for_tokens_and_zero_for_padding(handmade_device: Artifact) -> None:
    mask = DevicePipeline(handmade_device).encode(PROMPTS, 2)["text_mask"]
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    assert mask.dtype == np.float32


def test_names_that_a_graph_does_not_have_are_an_artifact_error(tmp_path: Path) -> None:
    for part, key, value in (("transformer", "latents", "pixels"), ("transformer", "output", "pixels")):
        graph = copy.deepcopy(DESCRIPTION)
        graph[part][key] = value
        with pytest.raises(ArtifactError, match=r"transformer and its description do not agree on '(image|pixels)'.*flashgen export"):
            DevicePipeline(publish(tmp_path / key, graph)).sample(PROMPTS[:1], [3])
    graph = copy.deepcopy(DESCRIPTION)
    graph["encoders"][0]["mask"] = None
    with pytest.raises(ArtifactError, match="subject_encoder and its description do not agree on 'attention'"):
        DevicePipeline(publish(tmp_path / "mask", graph)).sample(PROMPTS[:1], [3])


def test_values_that_do_not_fit_are_an_artifact_error(tmp_path: Path) -> None:
    graph = copy.deepcopy(DESCRIPTION)
    graph["conditioning"]["summary"] = {"concat": ["gist", "subject"], "axis": -1}
    with pytest.raises(ArtifactError, match=r"outputs of the text encoders do not fit the description .*flashgen export"):
        DevicePipeline(publish(tmp_path / "rank", graph)).sample(PROMPTS[:1], [3])
    graph = copy.deepcopy(DESCRIPTION)
    graph["conditioning"]["text_mask"] = {"concat": ["subject_mask", "subject_mask"], "axis": 1}  # 6 + 6 for 6 + 4 tokens
    with pytest.raises(ArtifactError, match=r"onnxruntime failed in transformer of .*show .* --verify"):
        DevicePipeline(publish(tmp_path / "mask", graph)).sample(PROMPTS[:1], [3])


def test_reopened_artifact_has_its_description(handmade_device: Artifact) -> None:
    assert open_artifact(handmade_device.path).manifest.extra["graph"] == handmade.DESCRIPTION
