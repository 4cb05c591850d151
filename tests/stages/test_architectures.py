"""SD3-Medium (no norms, no dual attention) and SD3.5-Large (no dual attention, another depth) pass every stage, narrow and shallow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashgen.families.sd3.specs import SPECS, spec
from flashgen.recipe.load import load
from tests import runs

NARROW = (
    "num_attention_heads",
    "attention_head_dim",
    "caption_projection_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "sample_size",
)
QUICK = [
    "bench.per_task=0", "distill.trajectory.prompts=4", "distill.trajectory.iterations=1", "distill.trajectory.teacher_steps=4",
    "distill.matching.iterations=1", "distill.matching.fake_score_warmup=0", "distill.matching.batch=2", "distill.matching.prompts=4",
    "distill.matching.validate_every=0", "restructure.iterations=0", "quantize.group=16",
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["sd3-medium", "sd35-large"])
def test_an_architecture_goes_from_teacher_to_device(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, like = SPECS["tiny"], spec(architecture).shallow(3)
    assert like.transformer["num_layers"] == 3 and not like.transformer["dual_attention_layers"]
    assert like.transformer["qk_norm"] == (None if architecture == "sd3-medium" else "rms_norm")
    narrow = like.transformer | {key: tiny.transformer[key] for key in NARROW} | {"pos_embed_max_size": 16}
    monkeypatch.setitem(SPECS, architecture, replace(tiny, transformer=narrow))
    recipe = load("shapes-demo", QUICK)
    top = runs.random(architecture, tmp_path / "teacher")
    student = runs.distill(str(top.path), tmp_path / "student", recipe)
    slim = runs.restructure(str(student.path), tmp_path / "slim", recipe)
    int4 = runs.quantize(str(slim.path), tmp_path / "int4", recipe)
    device = runs.export(str(int4.path), tmp_path / "device", recipe)
    assert min(device.manifest.metrics["psnr_db"].values()) >= 60
    files = {
        name: runs.generate(artifact.path, ["a dog"], tmp_path / f"{name}.png", seed)[0]
        for name, artifact, seed in (("int4", int4, 0), ("device", device, 0), ("another", int4, 5))
    }
    pictures = {name: np.asarray(Image.open(file)).astype(int) for name, file in files.items()}
    assert np.abs(pictures["int4"] - pictures["device"]).max() <= 2 < np.abs(pictures["int4"] - pictures["another"]).max()
