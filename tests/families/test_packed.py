"""The family of `tests/families/packed` passes every stage: nothing outside of a family's own package knows an architecture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from flashgen.artifact.manifest import Manifest
from flashgen.artifact.store import open_artifact
from flashgen.cli.app import app
from flashgen.errors import MachineError
from flashgen.export.page import PACKAGES, fetch
from flashgen.models.pipeline import load_pipeline
from flashgen.models.tiny_decoder import load_tiny_decoder, tiny_component
from tests.stages.test_damaged import reseal

FOLDER = Path(__file__).parent / "packed"
RECIPE = ("--recipe", FOLDER / "recipe.yaml", "--set", f"prompts_file={FOLDER / 'prompts.txt'}")
PROMPT, OTHER, SEED = "a red circle", "two birds on the moon", 5
HEADS = "distill.matching.node_adversarial=[0.1]"
SAME_DB = 60
DIFFERENT_DB = 50  # what other prompts reach at most

pytestmark = pytest.mark.usefixtures("packed")


def flashgen(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def made(*arguments: str | Path) -> Path:
    """The version that a stage with the family's recipe has written."""
    result = flashgen(*arguments, *RECIPE)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def refused(code: int, *arguments: str | Path) -> str:
    """The one sentence of a command that ends with `code`."""
    result = flashgen(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (sentence,) = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    return sentence


def manifest(version: Path) -> Manifest:
    return open_artifact(version, verify=True).manifest


def drawn(source: Path, out: Path, prompt: str, *options: str | Path) -> NDArray[np.float64]:
    device = ("--engine", "onnxruntime") if manifest(source).kind == "device" else ()
    result = flashgen("generate", source, prompt, "--seed", str(SEED), "--out", out, *device, *options)
    assert result.exit_code == 0, result.output
    return np.asarray(Image.open(out), np.float64)


def in_javascript(site: Path, prompt: str, scratch: Path) -> NDArray[np.float64]:
    """The picture that the page's worker draws, in node."""
    shutil.copytree(site, scratch / "site")
    (scratch / "site" / "package.json").write_text('{"type": "module"}')
    command = ["node", str(FOLDER / "worker.mjs"), str(scratch / "site"), prompt, str(SEED), str(scratch / "rgba")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["warnings"] == []
    return np.fromfile(scratch / "rgba", np.uint8).reshape(said["height"], said["width"], 4)[..., :3].astype(np.float64)


def psnr_db(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    assert a.shape == b.shape
    error = float(((a - b) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def web() -> str:
    """Why the page cannot run here; empty where it can. In CI it must."""
    try:
        for package in PACKAGES:
            fetch(package, offline=False)
        reason = "" if shutil.which("node") else "node is not installed"
    except MachineError as error:
        reason = str(error)
    assert not (reason and os.environ.get("CI")), reason
    return reason


@pytest.fixture(scope="module")
def teacher(root: Path, packed: Any) -> Path:
    result = flashgen("teacher", "random", "--like", "packed-tiny", "--out", root / "teacher")
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


@pytest.fixture(scope="module")
def student(root: Path, teacher: Path) -> Path:
    return made("distill", teacher, "--out", root / "student")


@pytest.fixture(scope="module")
def finetuned(root: Path, student: Path) -> Path:
    return made("finetune", student, "--out", root / "finetuned")


@pytest.fixture(scope="module")
def rounded(root: Path, finetuned: Path) -> Path:
    return made("quantize", finetuned, "--out", root / "rounded", "--set", "quantize.encoder_bits=8")


@pytest.fixture(scope="module")
def measured(root: Path, finetuned: Path) -> Path:
    settings = ["quantize.method=gptq", "quantize.budget=5.5", "quantize.low_rank_tolerance=10", "quantize.step_scales=true"]
    return made("quantize", finetuned, "--out", root / "measured", *(part for setting in settings for part in ("--set", setting)))


@pytest.fixture(scope="module")
def exports(root: Path, teacher: Path, rounded: Path, measured: Path, web: str) -> dict[str, tuple[Path, Path]]:
    """(source, export) by name: a guided teacher in another shape than the one that it knows, and quantized students."""
    page = () if web else ("--target", "web")
    wide = ("--set", "export.size_px=96x64", "--set", "export.vae_encoder=true")
    return {
        "teacher": (teacher, made("export", teacher, "--out", root / "wide", *wide, *page)),
        "rounded": (rounded, made("export", rounded, "--out", root / "device", *page)),
        "measured": (measured, made("export", measured, "--out", root / "small")),
    }


# ---- the stages


def test_a_plain_folder_imports_with_the_sampler_of_its_files(tmp_path: Path, teacher: Path) -> None:
    shutil.copytree(teacher, tmp_path / "plain")
    (tmp_path / "plain" / "manifest.json").unlink()
    result = flashgen("teacher", "import", tmp_path / "plain", "--out", tmp_path / "imported")
    assert result.exit_code == 0, result.output
    imported = manifest(Path(result.stdout.strip()))
    assert (imported.family, imported.world, imported.sampler) == ("packed", None, manifest(teacher).sampler)


def test_distill_and_finetune_write_students_of_the_family(teacher: Path, student: Path, finetuned: Path) -> None:
    for version, roles in ((student, {"teacher"}), (finetuned, {"student", "teacher"})):
        written = manifest(version)
        assert (written.family, written.kind, written.world) == ("packed", "student", None)
        assert {parent.role for parent in written.parents} == roles
        assert written.metrics["composition"] == "not judged"
        assert written.sampler is not None and (written.sampler.num_steps, written.sampler.guidance) == (4, 1)
        assert (version / "samples" / "validation.png").exists()
    weights = [(version / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for version in (teacher, student, finetuned)]
    assert len(set(weights)) == 3
    assert manifest(finetuned).metrics["merge_high"] == 0.7


@pytest.mark.parametrize(
    "settings",
    [
        ["distill.lora={rank: 4, base: bfloat16}", "compute.activation_checkpointing=true", "compute.precision=bfloat16"],
        [HEADS, "distill.size_px=96x64", "distill.on_policy.iterations=1", "distill.on_policy.prompts=4"],
        [HEADS, "distill.lora={rank: 4}", "distill.matching.validate_every=1"],
    ],
    ids=["adapters", "heads on wide pictures", "both"],
)
def test_distill_trains_with(settings: list[str], tmp_path: Path, teacher: Path) -> None:
    student = made("distill", teacher, "--out", tmp_path, *(part for setting in settings for part in ("--set", setting)))
    size = (64, 96) if "distill.size_px=96x64" in settings else (64, 64)
    picture = drawn(student, tmp_path / "a.png", PROMPT)
    assert picture.shape == (*size, 3) and picture.std() > 5


def test_restructure_is_refused_because_no_encoder_can_go(tmp_path: Path, student: Path) -> None:
    sentence = refused(2, "restructure-encoder", student, "--mode", "prune", *RECIPE, "--out", tmp_path)
    assert "no text encoder that a student can do without" in sentence and "flashgen quantize" in sentence


def test_a_tiny_decoder_takes_the_familys_latents(tmp_path: Path, student: Path) -> None:
    """Four pixels per latent, and a VAE that scales and shifts: the graph takes what the VAE's graph takes."""
    numbers = {"iterations": 2, "batch": 2, "width": 8, "held_out": 2, "psnr_floor_db": 0}
    settings = [f"restructure.decoder.{name}={value}" for name, value in numbers.items()] + ["restructure.prompts=4"]
    given = [part for setting in settings for part in ("--set", setting)]
    version = made("restructure-encoder", student, "--mode", "decoder", "--out", tmp_path, *given)
    network = AutoencoderTiny.from_pretrained(version / "tiny_decoder")
    pipe, sampler = load_pipeline(version), manifest(version).sampler
    assert sampler is not None
    vae = pipe.family.description(pipe.configs, sampler, {"tokenizer": 0})["vae"]
    part = next(part for part in pipe.family.export_components(pipe, sampler) if part.name == "vae_decoder")
    part = tiny_component(part, load_tiny_decoder(version / "tiny_decoder", 4, vae["factor"]), vae)
    z = torch.randn(2, 4, 6, 10)
    with torch.no_grad():
        expected = network.decode(z).sample
    assert expected.shape == (2, 3, 24, 40) and vae["scaling_factor"] != 1
    [picture] = part.reference({"latent_sample": z / vae["scaling_factor"] + vae["shift_factor"]})
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


def test_quantize_gives_every_layer_its_bits(rounded: Path, measured: Path) -> None:
    bits = {name: spec["bits"] for name, spec in json.loads((rounded / "quantized" / "layers.json").read_text()).items()}
    inside = {f"layers.{i}.{part}" for i in range(3) for part in ("ada.linear", "to_q", "to_k", "to_v", "to_out", "mlp.up", "mlp.down")}
    assert {name for name, count in bits.items() if count == 4} == inside
    assert {name for name, count in bits.items() if count == 8} == {"image_in", "text_in", "time_in.0", "time_in.2", "final"}
    assert (rounded / "quantized" / "language_model.json").exists()
    layers = json.loads((measured / "quantized" / "layers.json").read_text())
    assert {"layers.0.ada.linear.up", "layers.0.mlp.up"} <= layers.keys() and "layers.0.ada.linear" not in layers
    metrics, sampler = manifest(measured).metrics, manifest(measured).sampler
    assert metrics["mean_bits"] <= 5.5
    assert sampler is not None and sampler.scales is not None and len(sampler.scales) == 4


@pytest.mark.parametrize("name", ["teacher", "rounded", "measured"])
def test_torch_and_onnxruntime_draw_the_same_picture(name: str, exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, device = exports[name]
    size = () if name != "teacher" else ("--size", "96x64")
    expected = drawn(source, tmp_path / "torch.png", PROMPT, *size)
    assert expected.shape == ((64, 64, 3) if not size else (64, 96, 3)) and expected.std() > 5
    assert psnr_db(drawn(source, tmp_path / "other.png", OTHER, *size), expected) < DIFFERENT_DB
    assert psnr_db(drawn(device, tmp_path / "device.png", PROMPT), expected) >= SAME_DB
    assert manifest(device).family == "packed" and min(manifest(device).metrics["psnr_db"].values()) >= SAME_DB


@pytest.mark.parametrize("name", ["teacher", "rounded"])
def test_the_page_draws_the_same_picture(name: str, exports: dict[str, tuple[Path, Path]], web: str, tmp_path: Path) -> None:
    if web:
        pytest.skip(web)
    device = exports[name][1]
    assert psnr_db(in_javascript(device, PROMPT, tmp_path), drawn(device, tmp_path / "device.png", PROMPT)) >= SAME_DB


def test_both_start_from_the_same_picture(exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, device = exports["teacher"]
    start = drawn(source, tmp_path / "start.png", OTHER, "--size", "96x64")
    init = ("--init-image", tmp_path / "start.png", "--strength", "0.5")
    expected = drawn(source, tmp_path / "torch.png", PROMPT, "--size", "96x64", *init)
    assert psnr_db(expected, start) < SAME_DB
    assert psnr_db(drawn(device, tmp_path / "device.png", PROMPT, *init), expected) >= SAME_DB


def test_bench_measures_all_of_them_and_judges_none(exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, device = exports["rounded"]
    result = flashgen("bench", source, device, *RECIPE, "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["quality"]["composition"] for row in rows] == ["not judged"] * 2
    assert [row["engine"] for row in rows] == ["torch", "onnxruntime"]
    assert all(row["latency_s"][lap] > 0 for row in rows for lap in ("encode", "step_p50", "decode"))


# ---- what does not fit together


def relabelled(version: Path, out: Path, **names: str) -> Path:
    """A copy of `version` whose manifest gives another family or world, with a valid digest."""
    shutil.copytree(version, out)
    reseal(out, **names)
    return out


@pytest.mark.parametrize("command", ["generate", "quantize", "bench"])
def test_an_unknown_family_is_one_sentence_that_says_what_to_install(command: str, tmp_path: Path, student: Path) -> None:
    stranger = relabelled(student, tmp_path / "stranger", family="elsewhere")
    options = {"generate": (PROMPT, "--out", tmp_path / "a.png"), "quantize": (*RECIPE, "--out", tmp_path / "q"), "bench": RECIPE}
    for_any = () if command == "generate" else ("--set", "family=null")
    sentence = refused(3, command, stranger, *options[command], *for_any)
    assert "'elsewhere' is not known here (known: packed, sd3)" in sentence and "install the package" in sentence


def test_an_export_draws_where_its_family_is_not_installed(exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    device = exports["measured"][1]
    stranger = relabelled(device, tmp_path / "stranger", family="elsewhere")
    assert (drawn(stranger, tmp_path / "a.png", PROMPT) == drawn(device, tmp_path / "b.png", PROMPT)).all()


def test_an_unknown_world_is_one_sentence_that_says_what_to_install(tmp_path: Path, student: Path) -> None:
    stranger = relabelled(student, tmp_path / "stranger", world="nowhere")
    sentence = refused(3, "quantize", stranger, *RECIPE, "--out", tmp_path / "q")
    assert "'nowhere' is not known here" in sentence and "install the flashgen" in sentence


def test_a_recipe_of_another_family_is_refused(tmp_path: Path, teacher: Path) -> None:
    sentence = refused(2, "distill", teacher, *RECIPE, "--set", "family=sd3", "--out", tmp_path)
    assert "is for the model family sd3" in sentence and "--recipe" in sentence


def test_a_family_that_cannot_leave_out_blocks_says_so(tmp_path: Path, teacher: Path) -> None:
    sentence = refused(2, "distill", teacher, *RECIPE, "--set", "distill.trajectory.skip_layers={blocks: [1]}", "--out", tmp_path / "out")
    assert "distill.trajectory.skip_layers: the packed family of flashgen's tests cannot leave out blocks" in sentence


def test_a_start_of_another_family_is_refused(tmp_path: Path, teacher: Path, student: Path) -> None:
    other = relabelled(student, tmp_path / "other", family="sd3")
    sentence = refused(2, "distill", teacher, *RECIPE, "--set", f"distill.start={other}", "--out", tmp_path / "out")
    assert "start" in sentence and "is of the family sd3, not packed" in sentence
