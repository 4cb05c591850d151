"""The teacher that the package carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgen.artifact.store import Artifact
from flashgen.models.pipeline import load_pipeline
from flashgen.stages.inputs import open_input, world_of


@pytest.fixture(scope="module")
def teacher() -> Artifact:
    return open_input("shapes", ("teacher",), verify=True)


def test_embedded_teacher_is_small_and_carries_its_log(teacher: Artifact) -> None:
    assert teacher.size_bytes() <= 25e6
    phases = {line.split('"phase": "')[1].split('"')[0] for line in (teacher.path / "stats.jsonl").read_text().splitlines()}
    assert phases == {"autoencoder", "encoders", "teacher"}
    assert {"autoencoder", "encoders", "flow"} <= teacher.manifest.recipe.keys()


def test_embedded_teacher_names_its_family_and_world(teacher: Artifact) -> None:
    world = world_of(teacher)
    assert (teacher.manifest.family, teacher.manifest.world) == ("sd3", "shapes") and world is not None
    assert world.teacher() == teacher.path


def test_embedded_teacher_is_an_sd35_class_pipeline(teacher: Artifact) -> None:
    pipe = load_pipeline(teacher.path)
    assert pipe.family.pipeline_class == "StableDiffusion3Pipeline"
    config = pipe.transformer.config
    assert config.qk_norm == "rms_norm" and len(config.dual_attention_layers) > 0 and config.in_channels == 16
    assert pipe["text_encoder_3"] is not None and pipe.vae.config.latent_channels == 16


def test_embedded_teacher_holds_half_precision_weights_only(teacher: Artifact) -> None:
    from safetensors import safe_open

    for file in Path(teacher.path).rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {str(tensors.get_tensor(key).dtype) for key in tensors.keys()} == {"torch.float16"}  # noqa: SIM118  no dict
