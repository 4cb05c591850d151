"""Damaged weights, tokenizers and settings end in one sentence: no picture is drawn and no version published from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flashgen.artifact.files import sha256
from flashgen.artifact.manifest import Manifest
from flashgen.artifact.store import Artifact
from tests.cli.command import refused

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
QUANTIZE = ("quantize", "--recipe", "shapes-demo", "--set", "quantize.bits=4", "--set", "quantize.method=rtn")


def put(folder: Path, file: str, tensor: str, value: float) -> None:
    """Write `value` into the first number of a tensor; the file keeps its size."""
    weights = load_file(folder / file)
    weights[tensor].view(-1)[0] = value
    save_file(weights, folder / file, metadata={"format": "pt"})


def reseal(version: Path, **changes: Any) -> None:
    """Let the manifest list the files as they are, as a hostile or old program would."""
    raw = json.loads((version / "manifest.json").read_text()) | changes
    raw["files"] = [
        {"path": f["path"], "size": (version / f["path"]).stat().st_size, "sha256": sha256(version / f["path"])} for f in raw["files"]
    ]
    (version / "manifest.json").write_text(Manifest.model_validate(raw).sealed().model_dump_json())


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Artifact], Path]:
    """The copy of a version that a test may damage."""

    def copied(artifact: Artifact) -> Path:
        return Path(shutil.copytree(artifact.path, tmp_path / "copies" / "v0001"))

    return copied


@pytest.mark.parametrize(
    ("file", "tensor", "value"), [(TRANSFORMER, "proj_out.bias", float("nan")), (VAE, "decoder.conv_out.bias", float("-inf"))]
)
def test_weights_that_are_not_finite_are_neither_imported_nor_drawn(
    file: str, tensor: str, value: float, tiny_student: Artifact, copy: Callable[[Artifact], Path], tmp_path: Path
) -> None:
    version = copy(tiny_student)
    put(version, file, tensor, value)
    reseal(version)
    sentence = f"{file}: tensor {tensor} holds numbers that are not finite"
    assert sentence in refused(4, "generate", version, "a cat", "-o", tmp_path / "a.png")
    (version / "manifest.json").unlink()
    assert sentence in refused(4, "teacher", "import", version, "--out", tmp_path / "out")
    assert not (tmp_path / "a.png").exists() and not [*(tmp_path / "out").glob("v*")]


@pytest.mark.parametrize(
    ("scales", "factor", "network"), [([[1e308, 1e308]] * 4, 1.3, "transformer of"), (None, 1e-44, r"the decoder (vae)")]
)
def test_numbers_that_overflow_on_the_way_name_their_network(
    scales: Any, factor: float, network: str, tiny_student: Artifact, copy: Callable[[Artifact], Path], tmp_path: Path
) -> None:
    version = copy(tiny_student)
    config = json.loads((version / "vae/config.json").read_text())
    (version / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": factor}))
    reseal(version, sampler=json.loads((version / "manifest.json").read_text())["sampler"] | {"scales": scales})
    assert network in refused(4, "generate", version, "a cat", "-o", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("file", [TRANSFORMER, "text_encoder_2/model.safetensors", "tokenizer/tokenizer_config.json"])
def test_nothing_is_drawn_or_published_from_altered_files(
    file: str, tiny_student: Artifact, copy: Callable[[Artifact], Path], tmp_path: Path
) -> None:
    version = copy(tiny_student)
    path, when = version / file, (version / file).stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # of the last number, or of the last line
    path.write_bytes(data)
    os.utime(path, ns=(when, when))
    for command in (("generate", version, "a cat", "-o", tmp_path / "a.png"), (*QUANTIZE, version, "--out", tmp_path / "out")):
        assert f"{file} was altered or comes from another artifact" in refused(3, *command)
    assert not (tmp_path / "a.png").exists() and not [*(tmp_path / "out").glob("v*")]
