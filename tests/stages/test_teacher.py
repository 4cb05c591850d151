"""Teachers: imported from a folder or the hub, and trained from nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import translate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import open_artifact
from flashgen.errors import ArtifactError
from flashgen.models.pipeline import load_pipeline
from flashgen.recipe.load import load
from flashgen.stages import teacher
from tests import runs
from tests.stages.chain import MICRO, TRANSFORMER, Chain, digests


def test_import_takes_a_plain_diffusers_folder(chain: Chain, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    StableDiffusion3Pipeline.from_pretrained(str(chain.teacher.path)).save_pretrained(folder)
    (folder / "README.md").write_text("not part of a pipeline")
    (folder / "text_encoders").mkdir()  # ComfyUI's, in SD3.5's repositories
    shutil.copyfile(folder / TRANSFORMER, folder / "text_encoders" / "t5xxl_fp16.safetensors")
    index = json.loads((folder / "model_index.json").read_text())  # an IP-Adapter's, which flashgen has no use for
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": ["transformers", "SiglipVisionModel"]}))
    first = runs.import_(str(folder), tmp_path / "out")
    assert open_artifact(first.path, ("teacher",), verify=True).manifest.sampler == chain.teacher.manifest.sampler
    assert not (first.path / TRANSFORMER).samefile(folder / TRANSFORMER) and not (first.path / "README.md").exists()
    assert not (first.path / "text_encoders").exists()
    a, b = (load_pipeline(path).transformer.state_dict() for path in (chain.teacher.path, first.path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert runs.import_(str(folder), tmp_path / "out").path == first.path and first.manifest.world is None
    assert runs.import_(str(folder), tmp_path / "shapes", world="shapes").manifest.world == "shapes"

    weights = load_file(folder / TRANSFORMER)
    weights["proj_out.bias"] += 1
    save_file(weights, folder / TRANSFORMER, metadata={"format": "pt"})  # in place: other weights, the same size
    assert runs.import_(str(folder), tmp_path / "out").path.name == "v0002"
    assert open_artifact(first.path, verify=True).path == first.path


def test_a_hub_id_brings_the_pipeline_alone(monkeypatch: pytest.MonkeyPatch, chain: Chain) -> None:
    import huggingface_hub

    there = [
        "README.md", "model_index.json", "sd3.5_medium.safetensors", "mmdit-x.py", "text_encoders/clip_g.safetensors",
        "text_encoders/t5xxl_fp16.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors", "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors.index.fp16.json", "tokenizer/merges.txt",
        "tokenizer_3/spiece.model", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json",
    ]  # fmt: skip
    asked: list[str] = []

    def fetch(source: str, **patterns: Any) -> str:
        wanted, unwanted = ([re.compile(translate(p)) for p in patterns[kind]] for kind in ("allow_patterns", "ignore_patterns"))
        asked.extend(name for name in there if any(p.match(name) for p in wanted) and not any(p.match(name) for p in unwanted))
        return str(chain.teacher.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    teacher._download("stabilityai/stable-diffusion-3.5-medium")
    assert asked == ["model_index.json", *(name for name in there[6:] if "fp16" not in name)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "FluxPipeline"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae has no safetensors"),
    ],
    ids=["no index", "another pipeline", "no weights"],
)
def test_import_refuses_other_folders(spoil: Callable[[Path], object], message: str, chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher.path, tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json"))
    spoil(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=message):
        runs.import_(str(tmp_path / "plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_train_makes_a_teacher_that_can_be_distilled(tmp_path: Path) -> None:
    recipe = load(
        "shapes-demo",
        [
            *MICRO, "teacher.autoencoder.steps=2", "teacher.autoencoder.batch=4", "teacher.encoders.steps=2", "teacher.encoders.batch=4",
            "teacher.flow.steps=2", "teacher.flow.batch=4", "teacher.flow.samples=64", "teacher.flow.compile=false",
        ],
    )  # fmt: skip
    made = runs.train(recipe, tmp_path / "teacher")
    assert open_artifact(made.path, ("teacher",), verify=True).manifest.sampler == made.manifest.sampler
    pipe = load_pipeline(made.path)
    assert pipe.vae.config.scaling_factor != 1.0 and pipe.vae.config.shift_factor != 0.0  # set from the data
    phases = {json.loads(line)["phase"] for line in (made.path / "stats.jsonl").read_text().splitlines()}
    assert phases == {"autoencoder", "encoders", "teacher"}
    assert runs.train(recipe, tmp_path / "teacher").path == made.path
    again = runs.train(recipe, tmp_path / "again")
    assert digests(again) == digests(made)  # the same command makes the same teacher, tokenizers included
