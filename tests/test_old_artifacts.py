"""Artifacts that flashgen 0.2.0 wrote open, and draw what 0.2.0 drew from them. tests/fixtures/v0.2/README.md says how they were made."""

from __future__ import annotations

import importlib
import json
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from flashgen.cli.app import app

FIXTURES = Path(__file__).parent / "fixtures" / "v0.2"
PROMPT = "two red circles on a white background"
TEACHERS = ("teacher", "teacher-imported")
OTHERS = ("student", "pruned", "zeros", "compact", "quantized", "quantized-repaired")
DEVICES = ("device-student", "device-pruned", "device-zeros", "device-quantized", "device-quantized-repaired")
DRAWABLE = (*TEACHERS, *OTHERS, *DEVICES)


def flashgen(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def draw(name: str, out: Path, *options: str) -> NDArray[np.uint8]:
    engine = ("--engine", "onnxruntime") if name in DEVICES else ()
    result = flashgen("generate", FIXTURES / name / "v0001", *options, *engine, "-o", out)
    assert result.exit_code == 0, result.stderr
    return pixels(out)


def pixels(picture: Path) -> NDArray[np.uint8]:
    with Image.open(picture) as image:
        return np.asarray(image)


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Of two pictures of the same size, with a peak of 255; infinite when they are identical."""
    assert a.shape == b.shape
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def noise_module() -> ModuleType:
    try:
        return importlib.import_module("flashgen.noise")
    except ModuleNotFoundError:
        return importlib.import_module("flashgen.device.noise")


def test_the_list_above_names_every_fixture() -> None:
    assert sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()) == sorted([*DRAWABLE, "gguf"])


@pytest.mark.parametrize("name", [*DRAWABLE, "gguf"])
def test_an_old_artifact_opens_and_its_digests_hold(name: str) -> None:
    result = flashgen("show", FIXTURES / name / "v0001", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "digests checked" in result.stdout


@pytest.mark.parametrize("name", DRAWABLE)
def test_an_old_artifact_draws_its_old_picture(name: str, tmp_path: Path) -> None:
    drawn = draw(name, tmp_path / "a.png", PROMPT, "--seed", "7")
    assert psnr_db(drawn, pixels(FIXTURES / name / "picture.png")) >= 60


@pytest.mark.parametrize("name", TEACHERS)
def test_an_old_teacher_draws_its_old_picture_when_steps_and_guidance_are_given(name: str, tmp_path: Path) -> None:
    drawn = draw(name, tmp_path / "a.png", PROMPT, "--seed", "7", "--steps", "3", "--guidance", "2")
    assert psnr_db(drawn, pixels(FIXTURES / name / "picture-3-steps.png")) >= 60


@pytest.mark.parametrize("name", ["student", "device-student"])
def test_an_old_picture_says_how_it_was_drawn(name: str, tmp_path: Path) -> None:
    old = FIXTURES / name / "picture.png"
    assert psnr_db(draw(name, tmp_path / "a.png", "--from-png", str(old)), pixels(old)) >= 60


@pytest.mark.parametrize("name", ["student", "device-student"])
@pytest.mark.parametrize("asked", [(PROMPT, "--seed", "8"), ("a blue square left of a green cross", "--seed", "7")])
def test_another_seed_or_prompt_draws_another_picture(name: str, asked: tuple[str, ...], tmp_path: Path) -> None:
    assert psnr_db(draw(name, tmp_path / "a.png", *asked), pixels(FIXTURES / name / "picture.png")) < 40


def test_the_old_pictures_tell_the_artifacts_apart() -> None:
    """But for an artifact and its export, which draw the same. `teacher` is left out: its weights are too small to show."""
    pictures = {name: pixels(FIXTURES / name / "picture.png") for name in DRAWABLE if name != "teacher"}
    for a, b in combinations(pictures, 2):
        assert psnr_db(pictures[a], pictures[b]) < 50 or b == f"device-{a}", (a, b)


def test_an_old_gguf_is_refused_by_generate(tmp_path: Path) -> None:
    result = flashgen("generate", FIXTURES / "gguf" / "v0001", PROMPT, "--seed", "7", "-o", tmp_path / "a.png")
    assert (result.exit_code, result.stdout) == (3, "")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5])
def test_the_start_noise_of_a_seed_is_as_it_was(seed: int) -> None:
    old = json.loads((FIXTURES / "noise.json").read_text())
    noise = noise_module().latents(tuple(old["shape"]), [seed])
    assert noise.dtype == np.float32 and noise.shape == (1, *old["shape"])
    assert noise[0].ravel()[:24].tolist() == old["first"][str(seed)]
