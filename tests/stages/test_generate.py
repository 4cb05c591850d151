from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashgen.artifact.store import Artifact
from flashgen.device.sampler import DevicePipeline
from flashgen.errors import ArtifactError, MachineError, UsageError
from flashgen.families.base import velocity
from flashgen.flow.grid import shifted_grid
from flashgen.models.pipeline import load_pipeline
from flashgen.models.prompts import encode_prompts
from flashgen.models.sample import latent_shape, sample, sample_latents
from flashgen.noise import latents
from flashgen.pixels import Size, from_uint8
from flashgen.png import sheet
from flashgen.recipe.compression import ExportRecipe
from flashgen.recipe.schema import Recipe
from flashgen.stages.prompts import read_prompts
from flashgen.stages.request import Request, read_seeds, request_of_png
from tests import runs
from tests.conftest import make_pipeline_artifact, tiny_sampler
from tests.runs import generate

SQUARE = Size(64, 64)
PROMPTS = ["two red circles on a white background", "a blue square left of a green cross", "something else entirely"]
ENGINE: dict[str, Any] = {"engine": "onnxruntime"}  # where pictures are compared: the time that engines took must not decide


def image_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """With the usual peak of 255 for uint8 pictures."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 200.0 if error == 0 else float(20 * np.log10(255 / np.sqrt(error)))


def in_diffusers(artifact: Artifact, seeds: list[int], size: Size = SQUARE, **options: Any) -> np.ndarray:
    """The call that docs/artifacts.md gives."""
    from diffusers import StableDiffusion3Pipeline

    sampler = artifact.manifest.sampler
    assert sampler is not None
    absent = {} if sampler.has_all_encoders else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(str(artifact.path), **absent).to(torch.float32)
    pipe.scheduler.set_shift(1.0)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        PROMPTS,
        latents=torch.from_numpy(latents((16, size.height // 8, size.width // 8), seeds)),
        sigmas=sampler.sigmas[:-1],
        guidance_scale=sampler.guidance,
        max_sequence_length=sampler.tokens["t5"],
        height=size.height,
        width=size.width,
        **options,
    )
    return np.stack([np.asarray(image) for image in out.images])


@pytest.mark.parametrize("which", ["tiny_student", "tiny_teacher"])
def test_picture_equals_diffusers(which: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    assert artifact.manifest.sampler is not None
    ours = sample(load_pipeline(artifact.path), artifact.manifest.sampler, PROMPTS, [5, 6, 7], batch=2)
    assert image_psnr(in_diffusers(artifact, [5, 6, 7]), ours) >= 60
    assert image_psnr(in_diffusers(artifact, [8, 6, 7]), ours) < 40  # the test sees another seed


def test_a_wide_picture_equals_diffusers(tiny_student: Artifact) -> None:
    sampler, size = tiny_student.manifest.sampler, Size(height=48, width=96)
    assert sampler is not None
    pipe = load_pipeline(tiny_student.path)
    assert latent_shape(pipe, size) == (16, 6, 12)
    ours = sample(pipe, sampler, PROMPTS, [5, 6, 7], size_px=size)
    assert ours.shape == (3, 48, 96, 3) and image_psnr(in_diffusers(tiny_student, [5, 6, 7], size), ours) >= 60


@pytest.mark.parametrize(("encoder", "t5_tokens"), [("zeros", 16), ("prune", 0)])
def test_picture_equals_diffusers_without_t5(encoder: str, t5_tokens: int, tmp_path: Path) -> None:
    sampler = tiny_sampler(encoder=encoder, tokens={"clip": 16, "t5": t5_tokens})
    artifact = make_pipeline_artifact(tmp_path / "slim", kind="student", sampler=sampler)
    ours = sample(load_pipeline(artifact.path), sampler, PROMPTS, [5, 6, 7])
    assert image_psnr(in_diffusers(artifact, [5, 6, 7]), ours) >= 60


def test_device_picture_equals_torch(tiny_student: Artifact, tiny_device: Artifact) -> None:
    assert tiny_student.manifest.sampler is not None
    want = sample(load_pipeline(tiny_student.path), tiny_student.manifest.sampler, PROMPTS, [5, 6, 7])
    pipeline = DevicePipeline(tiny_device)
    assert image_psnr(want, pipeline.sample(PROMPTS, [5, 6, 7], batch=2)) >= 60
    guided = sample(load_pipeline(tiny_student.path), tiny_student.manifest.sampler, PROMPTS, [5, 6, 7], guidance=6.0, negative="a cat")
    assert image_psnr(guided, pipeline.sample(PROMPTS, [5, 6, 7], guidance=6.0, negative="a cat")) >= 60
    assert image_psnr(guided, want) < 60


def test_int4_device_picture_equals_the_quantized_student(tiny_quantized: Artifact, tiny_int4_device: Artifact) -> None:
    assert tiny_quantized.manifest.sampler is not None
    want = sample(load_pipeline(tiny_quantized.path), tiny_quantized.manifest.sampler, PROMPTS, [5, 6, 7])
    assert image_psnr(want, DevicePipeline(tiny_int4_device).sample(PROMPTS, [5, 6, 7])) >= 55  # fp16 file against fp32 codes


def test_torch_and_device_say_what_they_cut(tiny_student: Artifact, tiny_device: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    def cuts() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if "cuts the prompt" in line]

    prompts, sampler = ["a red circle and " * 30 + "a blue square", PROMPTS[0]], tiny_student.manifest.sampler
    assert sampler is not None
    sample(load_pipeline(tiny_student.path), sampler, prompts, [0, 1])
    by_torch = cuts()
    DevicePipeline(tiny_device).sample(prompts, [0, 1])
    assert len(by_torch) == 3 and cuts() == by_torch


def test_same_command_twice_gives_identical_bytes_and_says_how_it_was_made(tiny_device: Artifact, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert generate(str(tiny_device.path), [PROMPTS[0]], tmp_path / name, seed=3, **ENGINE) == [tmp_path / name]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == PROMPTS[0] and image.info["seed"] == "3"
        assert image.info["artifact"] == tiny_device.manifest.digest


def test_several_prompts_give_numbered_files_that_single_runs_repeat(tiny_device: Artifact, tmp_path: Path) -> None:
    files = generate(str(tiny_device.path), PROMPTS, tmp_path / "a.png", seed=3, **ENGINE)
    assert [f.name for f in files] == ["a-1.png", "a-2.png", "a-3.png"]
    single = generate(str(tiny_device.path), [PROMPTS[2]], tmp_path / "c.png", seed=5, **ENGINE)[0]
    pictures = [np.asarray(Image.open(f)) for f in (files[2], single)]
    assert image_psnr(*pictures) >= 60


def test_every_prompt_is_drawn_from_each_of_the_seeds_and_shown_on_one_sheet(tiny_device: Artifact, tmp_path: Path) -> None:
    files = generate(str(tiny_device.path), PROMPTS[:2], tmp_path / "a.png", seeds=[4, 9, 2], batch=4, contact_sheet=True, **ENGINE)
    with Image.open(files[4]) as image:
        assert (image.info["prompt"], image.info["seed"]) == (PROMPTS[1], "9")
    single = generate(str(tiny_device.path), [PROMPTS[1]], tmp_path / "c.png", seed=9, **ENGINE)[0]
    assert image_psnr(*(np.asarray(Image.open(file)) for file in (files[4], single))) >= 60
    whole = np.asarray(Image.open(tmp_path / "a-grid.png"))
    assert whole.shape == (128, 192, 3)
    assert np.array_equal(whole[64:, 64:128], np.asarray(Image.open(files[4])))
    assert np.array_equal(sheet(np.zeros((5, 2, 2, 3), np.uint8))[2:, 4:], np.full((2, 2, 3), 255))


def generate_request(source: Artifact, asked: Request, out: Path) -> list[Path]:
    from flashgen.stages.generate import generate as draw

    return draw(source, asked, out)


@pytest.mark.parametrize("which", ["tiny_device", "tiny_teacher"])
def test_a_picture_says_how_to_draw_it_again(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    teacher = which == "tiny_teacher"
    steps: dict[str, Any] = {"guidance": 3.0, "steps": 2, "negative": "a cat", "size_px": "64x128"} if teacher else {}
    engine: dict[str, Any] = {} if teacher else ENGINE
    first = generate(str(artifact.path), [PROMPTS[0]], tmp_path / "a.png", seed=2**63, **steps, **engine)[0]
    asked = request_of_png(first, artifact)
    second = generate_request(artifact, asked, tmp_path / "b.png")[0]
    assert first.read_bytes() == second.read_bytes()
    assert (asked.prompts, asked.seeds, asked.size) == ([PROMPTS[0]], [2**63], Size(128, 64) if teacher else None)


def test_pictures_that_cannot_be_drawn_again_are_usage_errors(
    tiny_device: Artifact, tiny_student: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, text, made = tmp_path / "plain.png", tmp_path / "text.png", tmp_path / "made.png"
    Image.new("RGB", (8, 8)).save(plain)
    text.write_text("no picture")
    generate(str(tiny_device.path), [PROMPTS[0]], made)
    for path, message in ((plain, "does not say how it was made"), (text, "is no PNG that can be read"), (tmp_path / "none", "is no PNG")):
        with pytest.raises(UsageError, match=message):
            request_of_png(path, tiny_device)
    request_of_png(made, tiny_student)
    assert "was drawn by another artifact" in capsys.readouterr().err


def test_a_start_picture_is_kept_the_more_the_less_noise_there_is_on_it(tiny_student: Artifact, tmp_path: Path) -> None:
    pipe, path = load_pipeline(tiny_student.path), tmp_path / "start.png"
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (1, 64, 3))
    Image.fromarray(pixels).save(path)
    sampler = tiny_student.manifest.sampler
    assert sampler is not None
    z = pipe.family.to_latents(pipe.vae, torch.from_numpy(from_uint8(pixels)))
    away = []
    for strength in (0.5, 0.9, 1.0):
        asked = Request(PROMPTS[:1], [3], init_image=path, strength=strength)
        options: dict[str, Any] = {"init": asked.init(tiny_student, sampler), "sigmas": asked.sigmas(sampler)}
        away.append(float((sample_latents(pipe, sampler, PROMPTS[:1], [3], **options) - z).norm()))
    assert away[0] < 0.8 * away[2] and away[0] < away[1]
    noise = sample_latents(pipe, sampler, PROMPTS[:1], [3])
    assert torch.allclose(sample_latents(pipe, sampler, PROMPTS[:1], [3], **options), noise)
    file = generate(str(tiny_student.path), PROMPTS[:1], tmp_path / "a.png", init_image=path, strength=0.8)[0]
    with pytest.raises(UsageError, match=r"began with --init-image start\.png"):
        request_of_png(file, tiny_student)
    for strength, message in ((0.2, r"leaves no step .* use 0\.5 or more"), (0.9, "is no picture that can be read")):
        with pytest.raises(UsageError, match=message):
            generate(str(tiny_student.path), PROMPTS[:1], tmp_path / "b.png", init_image=tmp_path, strength=strength)


def test_a_start_picture_is_turned_upright_and_cut_to_the_pictures_proportions(
    tiny_student: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tall, turned = np.zeros((192, 64, 3), np.uint8), Image.Exif()
    tall[64:96] = 200  # the upper half of the centre
    turned[0x0112] = 6
    Image.fromarray(np.rot90(tall)).save(tmp_path / "a.png", exif=turned)
    found = Request(PROMPTS[:1], [3], init_image=tmp_path / "a.png").init(tiny_student, tiny_sampler())
    assert found is not None and np.array_equal(found, tall[64:128])
    assert "a.png is 64x192: cropped to the proportions of 64\n" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_start_picture_that_is_none_is_one_sentence(content: bytes, tiny_student: Artifact, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.png is no picture that can be read"):
        Request(PROMPTS[:1], [3], init_image=tmp_path / "a.png").init(tiny_student, tiny_sampler())


def test_a_teacher_draws_in_a_thousand_steps_at_most(tiny_teacher: Artifact) -> None:
    assert Request(PROMPTS[:1], [3], steps=1000).check(tiny_teacher)
    with pytest.raises(UsageError, match=r"--steps 1001: .* draws in 1 to 1000 steps"):
        Request(PROMPTS[:1], [3], steps=1001).check(tiny_teacher)


def test_a_start_picture_keeps_the_scales_of_the_steps_that_are_left(tiny_student: Artifact, tmp_path: Path) -> None:
    """`quantize.step_scales` holds for the end of the grid too: the steps from a picture on are the last ones of a picture from noise."""
    pipe, path = load_pipeline(tiny_student.path), tmp_path / "start.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(path)
    pairs = [(1.0, 1.0), (1.0, 1.0), (0.5, 1.5), (0.8, 0.7)]
    plain, scaled, first = (tiny_sampler(scales=scales) for scales in (None, pairs, [(2.0, 2.0), *pairs[1:2], (1.0, 1.0), (1.0, 1.0)]))
    asked = Request(PROMPTS[:1], [3], init_image=path, strength=0.8)
    sigmas = asked.sigmas(plain)
    assert sigmas == plain.sigmas[-3:] and scaled.scales_on(sigmas) == pairs[2:]
    options: dict[str, Any] = {"init": asked.init(tiny_student, plain), "sigmas": sigmas}
    drawn = [sample_latents(pipe, sampler, PROMPTS[:1], [3], **options) for sampler in (plain, scaled, first)]
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2) and torch.equal(drawn[0], drawn[2])

    x = (1 - sigmas[0]) * pipe.family.to_latents(pipe.vae, torch.from_numpy(from_uint8(np.asarray(Image.open(path)))))
    x = x + sigmas[0] * torch.from_numpy(latents((16, 8, 8), [3]))
    cond = encode_prompts(pipe, PROMPTS[:1], plain)
    with torch.no_grad():
        for sigma, after, (state, speed) in zip(sigmas, sigmas[1:], pairs[2:], strict=False):  # Q-Sched's step, written out
            x = state * x + speed * (after - sigma) * velocity(pipe.transformer, x, torch.full((1,), sigma), cond)
    assert torch.allclose(drawn[1], x, atol=1e-5)


def test_seeds_are_numbers_and_rising_ranges() -> None:
    assert read_seeds("1, 5-7,18446744073709551615") == [1, 5, 6, 7, 2**64 - 1]
    for text in ("9" * 5000, "1-" + "9" * 5000, "", "a", "3-1", "1,,2", "-1", "0-10000", "0-9999,1"):
        with pytest.raises(UsageError, match="numbers and rising ranges"):
            read_seeds(text)


def test_a_prompt_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    for name, message in (("empty.txt", "has no prompts"), ("binary", "cannot be read as text"), ("none", "cannot be read as text")):
        with pytest.raises(UsageError, match=message):
            read_prompts(tmp_path / name)


def test_teacher_draws_in_any_number_of_steps(tiny_teacher: Artifact, tmp_path: Path) -> None:
    generate(str(tiny_teacher.path), [PROMPTS[0]], tmp_path / "a.png", seed=1, steps=2)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["sigmas"] == str([round(s, 9) for s in shifted_grid(2, 3.0)])
        assert image.info["guidance"] == "4.5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a cat", "  "]}, "prompt is empty"),
        ({"prompts": []}, "prompt is empty"),
        ({"steps": 5}, "--steps 5: .* draws in 4 steps"),
        ({"steps": 0}, "--steps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"guidance": 0.5}, "--guidance 0.5"),
        ({"size_px": 128}, "--size 128: this export draws 64 px only"),
        ({"init_image": Path("file")}, "was exported without the VAE's encoder; export again with --set export.vae_encoder=true"),
        ({"memory": "2"}, "--memory 2: write a number and a unit"),
        ({"seeds": [1, 2**64]}, "--seed 18446744073709551616 is out of range"),
        ({"out": "a.jpg"}, "a.jpg is not a .png"),
        ({"out": "file/a.png"}, "--out"),
    ],
)
def test_impossible_requests_are_usage_errors_before_any_work(
    changes: dict[str, Any], message: str, tiny_device: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(DevicePipeline, "__init__", None)  # starting to work would be another error
    request: dict[str, Any] = {"prompts": ["a cat"], "out": "a.png", "seed": 0, **changes}
    with pytest.raises(UsageError, match=message):
        generate(str(tiny_device.path), request.pop("prompts"), Path(request.pop("out")), **request)


def test_torch_artifact_refuses_sizes_that_its_model_cannot_make(tiny_student: Artifact, tmp_path: Path) -> None:
    for size in (40, 528, "80x40", "528x64", "64x528"):
        with pytest.raises(
            UsageError, match=f"--size {size}: this model draws sides that are multiples of 16 px up to 512; .* --size 64 works"
        ):
            generate(str(tiny_student.path), ["a cat"], tmp_path / "a.png", size_px=size)
    with pytest.raises(UsageError, match="--size: picture sides must be 1 to 32768 px, not 0"):
        generate(str(tiny_student.path), ["a cat"], tmp_path / "a.png", size_px=0)
    for size, expected in ((80, (80, 80)), ("96x48", (96, 48))):
        generate(str(tiny_student.path), ["a cat"], tmp_path / "a.png", size_px=size)
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == expected


def test_negative_without_guidance_is_a_loud_warning(tiny_device: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(str(tiny_device.path), ["a cat"], tmp_path / "a.png", negative="a dog")
    assert "NO EFFECT at guidance 1" in capsys.readouterr().err


def test_folder_that_is_no_sd3_pipeline_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ArtifactError, match="is a FluxPipeline; flashgen takes StableDiffusion3Pipeline"):
        load_pipeline(tmp_path)


@pytest.fixture(scope="module")
def device_with_encoder(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    recipe = Recipe(name="test", export=ExportRecipe(vae_encoder=True))
    return runs.export(str(tiny_student.path), tmp_path_factory.mktemp("device") / "device", recipe, 0, False)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_device_starts_from_a_picture_as_torch_does(
    strength: float, tiny_student: Artifact, device_with_encoder: Artifact, tmp_path: Path
) -> None:
    picture = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    Image.fromarray(picture).save(tmp_path / "init.png")
    start: dict[str, Any] = {"init_image": tmp_path / "init.png", "strength": strength}
    drawn = [
        generate(str(tiny_student.path), PROMPTS[:1], tmp_path / "student.png", **start),
        generate(str(device_with_encoder.path), PROMPTS[:1], tmp_path / "device.png", **start, **ENGINE),
    ]
    torch_, device = (np.asarray(Image.open(files[0])) for files in drawn)
    assert image_psnr(torch_, device) >= 60
    plain = DevicePipeline(device_with_encoder).sample(PROMPTS[:1], [0])[0]
    assert (image_psnr(plain, device) >= 60) == (strength == 1)


@pytest.mark.parametrize("which", ["tiny_student", "tiny_device"])
def test_the_last_preview_is_the_picture(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    generate(str(request.getfixturevalue(which).path), PROMPTS[:1], tmp_path / "a.png", preview=True)
    last, whole = (Image.open(tmp_path / name) for name in ("a-preview.png", "a.png"))
    assert last.info["step"] == "4"
    assert image_psnr(np.asarray(last), np.asarray(whole)) >= 60


def test_memory_is_planned_and_said(tiny_device: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(str(tiny_device.path), PROMPTS, tmp_path / "a.png", memory="8GB")
    assert re.search(r"memory: at most about \d\.\d\dGB in \w+; batch 3, decoded whole", capsys.readouterr().err)
    with pytest.raises(MachineError, match=r"--memory 0\.01GB is too little for .*; --memory \d\.\d\dGB would do"):
        generate(str(tiny_device.path), PROMPTS, tmp_path / "a.png", memory="10MB")


@pytest.mark.parametrize("asked", [{"engine": "onnxruntime"}, {"memory": "2GB"}])
def test_what_is_for_exported_artifacts_is_refused_for_others(asked: dict[str, Any], tiny_student: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(asked))} is for exported artifacts"):
        generate(str(tiny_student.path), PROMPTS, tmp_path / "a.png", **asked)
