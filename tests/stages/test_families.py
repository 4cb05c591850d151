"""SD3-Medium (no norms, no dual attention) and SD3.5-Large (no dual attention, another depth) pass every stage, narrow and shallow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashgen.models.specs import SPECS, spec
from flashgen.recipe.load import load
from flashgen.stages import distill, export, generate, quantize, restructure, teacher

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
    "distill.matching.iterations=1", "distill.matching.proxy_warmup=0", "distill.matching.batch=2", "distill.matching.prompts=4",
    "distill.matching.watch_every=0", "restructure.iterations=0", "quantize.group=16",
]  # fmt: skip


@pytest.mark.parametrize("family", ["sd3-medium", "sd35-large"])
def test_a_family_goes_from_teacher_to_device(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, like = SPECS["tiny"], spec(family).shallow(3)
    assert like.transformer["num_layers"] == 3 and not like.transformer["dual_attention_layers"]
    assert like.transformer["qk_norm"] == (None if family == "sd3-medium" else "rms_norm")
    narrow = like.transformer | {key: tiny.transformer[key] for key in NARROW} | {"pos_embed_max_size": 16}
    monkeypatch.setitem(SPECS, family, replace(tiny, transformer=narrow))
    recipe = load("shapes-demo", QUICK)
    top = teacher.random(family, tmp_path / "teacher", 0, False)
    student = distill.run(str(top.path), tmp_path / "student", recipe, 0, False)
    slim = restructure.run(str(student.path), tmp_path / "slim", recipe, 0, False, "prune")
    int4 = quantize.run(str(slim.path), tmp_path / "int4", recipe, 0, False)
    device = export.run(str(int4.path), tmp_path / "device", recipe, 0, False)
    assert min(device.manifest.metrics["psnr_db"].values()) >= 60
    pictures = [
        np.asarray(Image.open(generate.run(str(a.path), ["a dog"], tmp_path / f"{a.manifest.kind}.png")[0])) for a in (int4, device)
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2
