"""restructure-encoder --mode decoder: a tiny decoder is trained, kept, exported and drawn with; and starts that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from flashgen.artifact.store import Artifact, versions
from flashgen.errors import UsageError
from flashgen.families.tiny_decoder import CONFIG, TINY_DECODER, WEIGHTS
from flashgen.models.footprint import Footprint
from flashgen.models.pipeline import load_pipeline
from flashgen.models.sample import sample_latents
from flashgen.pixels import to_uint8
from flashgen.recipe.load import load
from flashgen.recipe.schema import Recipe
from flashgen.stages.base import prepare
from flashgen.stages.decoder import TrainDecoder
from flashgen.stages.planning import Plan
from flashgen.training import loop, recovery
from flashgen.training.checkpoint import Checkpoint
from tests import runs
from tests.cli.command import flashgen, made_by, refused
from tests.stages.chain import digests, linked, micro
from tests.stages.test_card import picture_of, programs
from tests.stages.test_generate import PROMPTS, image_psnr
from tests.stages.test_restructure import scored

SECTION = "restructure.decoder"
NUMBERS = {"width": 8, "blocks": 1, "iterations": 2, "batch": 2, "crop": 4, "held_out": 2, "psnr_floor_db": 0}
SETTINGS = ["restructure.prompts=4", "bench.per_task=0", *(f"{SECTION}.{name}={value}" for name, value in NUMBERS.items())]


def words(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


def trained(source: Artifact, out: Path, *more: str) -> Artifact:
    return made_by("restructure-encoder", source.path, "--mode", "decoder", "-o", out, *words(*more))


@pytest.fixture(scope="module")
def student(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny student with a tiny decoder."""
    return trained(tiny_student, tmp_path_factory.mktemp("decoder") / "student")


@pytest.fixture(scope="module")
def device(student: Artifact, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return runs.export(student.path, tmp_path_factory.mktemp("decoder") / "device", recipe)


def test_the_student_gets_a_tiny_decoder_and_keeps_everything_else(student: Artifact, tiny_student: Artifact) -> None:
    parts = {file.path.split("/")[0] for file in tiny_student.manifest.files}
    assert linked(tiny_student, student) == parts - {"model_index.json", "scheduler"}  # the card's stage sets the scheduler
    assert (student.path / "model_index.json").read_bytes() == (tiny_student.path / "model_index.json").read_bytes()
    network = AutoencoderTiny.from_pretrained(student.path / TINY_DECODER)
    assert network.decode(torch.zeros(1, 16, 3, 5)).sample.shape == (1, 3, 24, 40)
    assert student.manifest.metrics[TINY_DECODER]["psnr_worst_db"] <= student.manifest.metrics[TINY_DECODER]["psnr_db"] < 60
    assert student.manifest.sampler == tiny_student.manifest.sampler


def test_later_stages_keep_the_tiny_decoder(student: Artifact, tmp_path: Path) -> None:
    zeros = runs.restructure(student.path, tmp_path / "zeros", micro("bench.per_task=0"), mode="zeros")
    assert TINY_DECODER in linked(student, zeros)
    again = trained(zeros, tmp_path / "again", f"{SECTION}.lr=0.01")  # needs no T5
    assert TINY_DECODER not in linked(zeros, again) and "vae" in linked(zeros, again)
    assert TINY_DECODER in linked(again, runs.quantize(again.path, tmp_path / "int4", micro("bench.per_task=0")))


def test_below_the_floor_nothing_is_published(tiny_student: Artifact, tmp_path: Path) -> None:
    floor = words(f"{SECTION}.psnr_floor_db=90")
    result = flashgen("restructure-encoder", tiny_student.path, "--mode", "decoder", "-o", tmp_path / "out", *floor)
    assert result.exit_code == 4 and versions(tmp_path / "out") == []
    assert "below restructure.decoder.psnr_floor_db=90; train longer" in result.stderr.splitlines()[-1]


def test_a_judge_has_a_floor_too(tiny_student: Artifact, tmp_path: Path) -> None:
    source = scored(tiny_student, tmp_path / "scored", 1.0)
    command: list[str | Path] = ["restructure-encoder", source.path, "--mode", "decoder", "-o", tmp_path / "out"]
    command += words("bench.per_task=1")
    result = flashgen(*command, "--set", "restructure.floor=1")
    assert result.exit_code == 4 and versions(tmp_path / "out") == []
    assert "below the floor of 1.000" in result.stderr and "longer with --set restructure.decoder.iterations=N" in result.stderr
    published = made_by(*command, "--set", "restructure.floor=0")
    assert published.manifest.metrics[TINY_DECODER]["composition"]["overall"] < 1
    assert published.manifest.metrics["composition"] == {"overall": 1.0} and (published.path / "samples" / "validation.png").exists()


def test_a_resumed_training_gives_the_same_decoder(
    student: Artifact, tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[str]()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        steps.append(options["where"])
        if len(steps) == 2:
            raise KeyboardInterrupt
        return loop.descend(*arguments, **options)

    command = ("restructure-encoder", tiny_student.path, "--mode", "decoder", "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "descend", interrupted)
        patch.setattr(Checkpoint, "due", lambda _: True)
        assert flashgen(*command, *words()).exit_code == 130
    resumed = trained(tiny_student, tmp_path / "out")
    assert steps == ["decoder step 0", "decoder step 1"] and digests(resumed) == digests(student)


# ---- export


def test_an_export_draws_with_the_tiny_decoder_as_torch_does(student: Artifact, device: Artifact, tmp_path: Path) -> None:
    assert device.manifest.metrics["psnr_db"]["vae_decoder"] >= 60
    [drawn] = runs.generate(device.path, PROMPTS[:1], tmp_path / "a.png", engine="onnxruntime")
    pipe, sampler = load_pipeline(student.path), student.manifest.sampler
    assert sampler is not None
    z = sample_latents(pipe, sampler, PROMPTS[:1], [0])
    with torch.no_grad():
        expected = to_uint8(AutoencoderTiny.from_pretrained(student.path / TINY_DECODER).decode(z).sample.numpy())
        by_vae = to_uint8(pipe.family.from_latents(pipe.vae, z).numpy())
    with Image.open(drawn) as image:
        picture = np.asarray(image)[None]
        assert image.info["decoder"] == "tiny"
    assert image_psnr(picture, expected) >= 60 > image_psnr(picture, by_vae)
    assert "decoder  tiny" in flashgen("show", device.path).stdout
    vae = Footprint(student).decoder
    assert device.manifest.extra["graph"]["vae"] == vae | {"channels": NUMBERS["width"], "attention": False}
    config = json.loads((device.path / "vae_decoder" / CONFIG).read_text())
    assert (config["block_out_channels"], config["scaling_factor"], config["shift_factor"]) == ([8] * 4, 1.3, 0.1)  # of the graph's inputs


def test_an_export_may_keep_the_vae(student: Artifact, tiny_student: Artifact, recipe: Recipe) -> None:
    def prepared(source: Artifact, decoder: str) -> Any:
        export = recipe.export.model_copy(update={"decoder": decoder})
        return runs.prepared("export", {"student": source.path}, recipe.model_copy(update={"export": export}))

    plain = prepared(tiny_student, "auto").settings()
    assert "decoder" not in plain and prepared(student, "vae").settings() == plain  # an export of a student without one stays up to date
    assert prepared(student, "auto").settings() == prepared(student, "tiny").settings() == plain | {"decoder": "tiny"}
    with pytest.raises(UsageError, match="has no tiny decoder; train one first"):
        prepared(tiny_student, "tiny")


def test_the_card_has_two_lines_that_take_the_tiny_decoder(student: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    program, lines = programs(student)[:2]
    with_tiny = program.replace("image = pipe(", f"{lines}image = pipe(")
    vae, tiny = (picture_of(text, student.path, monkeypatch) for text in (program, with_tiny))
    assert vae.shape == tiny.shape == (1, 64, 64, 3) and image_psnr(vae, tiny) < 60


# ---- plans and starts


def test_a_plan_counts_the_work_of_both_decoders(tiny_student: Artifact) -> None:
    def planned(iterations: int, batch: int) -> Plan:
        numbers = (f"{SECTION}.iterations={iterations}", f"{SECTION}.batch={batch}")
        plan = prepare(TrainDecoder, {"student": tiny_student.path}, load("shapes-demo", [*SETTINGS, *numbers]), device="cpu").plan()
        assert plan is not None
        return plan

    small, wide, long = planned(2, 2), planned(2, 8), planned(9, 2)
    sizes = [plan.memory["train"]["activations"] for plan in (small, wide, long)]
    assert sizes == [sizes[0], 4 * sizes[0], sizes[0]] and small.forwards == (4 + 2) * 4
    per_crop = (wide.work["fp32"] - small.work["fp32"]) / 12
    assert per_crop > 0 and (long.work["fp32"] - small.work["fp32"]) / 14 == pytest.approx(per_crop)


def test_a_start_without_training_is_taken_as_it_is(student: Artifact, tiny_student: Artifact, tmp_path: Path) -> None:
    start = f"{SECTION}.start={student.path / TINY_DECODER}"
    taken = trained(tiny_student, tmp_path / "out", start, f"{SECTION}.iterations=0")
    before, after = (load_file(artifact.path / TINY_DECODER / WEIGHTS) for artifact in (student, taken))
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert taken.manifest.recipe["decoder"]["start_sha256"]
    more = trained(tiny_student, tmp_path / "more", start)
    assert not torch.equal(load_file(more.path / TINY_DECODER / WEIGHTS)["decoder.layers.0.weight"], before["decoder.layers.0.weight"])


def put(**values: Any) -> Callable[[Path], object]:
    """Set `values` in the config."""
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | values))


def weights(name: str, value: torch.Tensor | None) -> Callable[[Path], object]:
    """Set one tensor, or remove it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS) | ({name: value} if value is not None else {})
        save_file({key: tensor for key, tensor in tensors.items() if value is not None or key != name}, folder / WEIGHTS)

    return change


LAYER = "decoder.layers.0.bias"
HOSTILE: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "no config": (3, lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "another class": (3, put(_class_name="AutoencoderKL"), "is of 'AutoencoderKL'"),
    "another VAE": (3, put(latent_channels=4), "4 latent channels and 8 pixels per latent, the VAE has 16 and 8"),
    "another factor": (3, put(decoder_block_out_channels=[8] * 3, num_decoder_blocks=[1] * 3), "16 latent channels and 4 pixels"),
    "other blocks": (3, put(num_decoder_blocks=[1, 1, 2, 1]), f"{WEIGHTS} has no weights decoder"),
    "endless blocks": (3, put(num_decoder_blocks=[1, 1, 1 << 40, 1]), "num_decoder_blocks"),
    "endless width": (3, put(decoder_block_out_channels=[1 << 40] * 4), "decoder_block_out_channels"),
    "widths that differ": (3, put(decoder_block_out_channels=[8, 8, 8, 16]), "not all the same"),
    "another activation": (3, put(act_fn="os.system"), "act_fn"),
    "another scale": (3, put(scaling_factor=0.5), "scaling_factor"),
    "pickled weights": (3, lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), WEIGHTS),
    "cut weights": (3, lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999]), "not a whole safetensors"),
    "a tensor missing": (3, weights(LAYER, None), f"no weights {LAYER} [8]"),
    "a tensor of another shape": (3, weights(LAYER, torch.zeros(9)), f"no weights {LAYER} [8]"),
    "a tensor of integers": (3, weights(LAYER, torch.zeros(8, dtype=torch.int32)), f"no weights {LAYER} [8]"),
    "not a number": (4, weights(LAYER, torch.full((8,), torch.nan)), f"{LAYER} holds numbers that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_start_that_does_not_fit_is_refused_in_one_sentence(case: str, student: Artifact, tiny_student: Artifact, tmp_path: Path) -> None:
    code, change, message = HOSTILE[case]
    folder = Path(shutil.copytree(student.path / TINY_DECODER, tmp_path / "start"))
    change(folder)
    given = words(f"{SECTION}.start={folder}", f"{SECTION}.iterations=0")
    said = refused(code, "restructure-encoder", tiny_student.path, "--mode", "decoder", "-o", tmp_path / "out", *given)
    assert message in said and str(folder) in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("start=nowhere", 3, "restructure.decoder.start: there is no folder nowhere"),
        ("start=hf:nobody", 2, "is no hub id; write hf:OWNER/NAME"),
        ("iterations=0", 2, "trains nothing; give a tiny decoder with --set restructure.decoder.start="),
        ("held_out=0", 2, "held_out"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, code: int, message: str, tiny_student: Artifact, tmp_path: Path) -> None:
    given = words(f"{SECTION}.{setting}")
    assert message in refused(code, "restructure-encoder", tiny_student.path, "--mode", "decoder", "-o", tmp_path / "out", *given)
