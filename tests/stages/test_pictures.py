"""Real pictures for the adversary: every kind of source, captions, what is left out, the cache, the plan, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.models.pipeline import load_pipeline
from flashgen.pixels import Size, from_uint8
from flashgen.stages import pictures
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.picture_files import decode
from flashgen.stages.pictures import PictureSource
from flashgen.training.pictures import RealPictures
from tests import runs
from tests.cli.command import refused
from tests.stages.chain import MICRO, TRANSFORMER, Chain, digests, micro

SIDE = 64
CAPTIONS = ["a red circle", "", "two blue squares", "a star", "a star"]
ADVERSARY = ("distill.matching.node_adversarial=[1]", "distill.trajectory.iterations=0")
FIELD = "distill.matching.adversarial"


def image(number: int) -> Image.Image:
    """A picture of its own colour and proportions, with a stripe that a wrong crop would move."""
    pixels = np.full((40 + 10 * number, 90, 3), 40 * number, np.uint8)
    pixels[:, 30:50] = 255
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    image(number).save(stream, "PNG")
    return stream.getvalue()


def folder(path: Path, captions: bool = True) -> Path:
    path.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        (path / f"{number}.png").write_bytes(png(number))
        if caption and captions:
            (path / f"{number}.txt").write_text(f" {caption}\n")
    return path


def listed(path: Path) -> Path:
    """A folder with metadata.jsonl."""
    folder(path / "sub", captions=False)
    rows = [{"file_name": f"sub/{number}.png", "caption": caption or None} for number, caption in enumerate(CAPTIONS)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def shard(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(CAPTIONS):
            for suffix, data in (("large.png", png(number)), ("txt", caption.encode()), ("cls", b"0")):
                member = tarfile.TarInfo(f"part/{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def parquet(path: Path, struct: bool = True) -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(number), "path": f"{number}.png"} if struct else png(number) for number in range(len(CAPTIONS))]
    rows = [
        {"image": cell, "caption": caption or None, "id": number}
        for number, (cell, caption) in enumerate(zip(cells, CAPTIONS, strict=True))
    ]
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def recipe_of(path: Path, *more: str) -> Any:
    return micro(*ADVERSARY, f"{FIELD}.pictures={path}", *more)


def source_of(teacher: Artifact, path: Path, *more: str) -> PictureSource:
    stage = prepare(Distill, {"teacher": teacher.path}, recipe_of(path, *more))
    assert isinstance(stage, Distill) and stage.pictures is not None
    return stage.pictures


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda tmp: folder(tmp / "pictures"),
    "metadata": lambda tmp: listed(tmp / "pictures"),
    "tar": lambda tmp: shard(tmp / "pictures.tar"),
    "parquet": lambda tmp: parquet(tmp / "pictures.parquet"),
    "parquet of bytes": lambda tmp: parquet(tmp / "pictures.parquet", struct=False),
    "folder of shards": lambda tmp: shard(folder(tmp / "pictures" / "none").parent / "one.tar").parent,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_pictures_and_captions_come_from_every_source(kind: str, tiny_teacher: Artifact, tmp_path: Path) -> None:
    source = source_of(tiny_teacher, SOURCES[kind](tmp_path))
    found = [(decode(picture.read(), source.sizes[0]), picture.caption) for picture in source.pictures]  # type: ignore[arg-type]
    times = 2 if kind == "folder of shards" else 1
    assert [caption for _, caption in found] == CAPTIONS * times and source.num_captions == 4
    for (pixels, _), number in zip(found, [*range(len(CAPTIONS))] * times, strict=True):
        assert np.array_equal(pixels, decode(png(number), source.sizes[0]))


@pytest.mark.parametrize("kind", ["metadata", "parquet"])
def test_captions_of_a_table_are_left_out_on_request(kind: str, tiny_teacher: Artifact, tmp_path: Path) -> None:
    source = source_of(tiny_teacher, SOURCES[kind](tmp_path), f"{FIELD}.caption_column=null")
    assert [picture.caption for picture in source.pictures] == [""] * len(CAPTIONS)


def test_a_picture_is_turned_upright_cropped_in_the_centre_and_resized() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40], wide[10:, 20:40] = (200, 0, 0), (0, 0, 200)  # the centre: red above blue
    stream, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 3  # EXIF's orientation: by 180 degrees
    Image.fromarray(wide[::-1]).save(stream, "PNG", exif=turned)
    pixels = decode(stream.getvalue(), Size(10, 10))
    assert pixels.shape == (10, 10, 3)
    assert np.abs(pixels[:4] - np.array((200.0, 0, 0))).max() < 15 and np.abs(pixels[6:] - np.array((0, 0, 200.0))).max() < 15
    assert decode(stream.getvalue(), Size(8, 24)).shape == (8, 24, 3)


def test_distill_learns_from_real_pictures_without_trajectories(
    chain: Chain,
    real_pictures: list[list[RealPictures]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = folder(tmp_path / "pictures")
    (path / "2.png").write_bytes(png(2)[:-60])
    (path / "3a.jpg").write_text("no picture")
    made = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe_of(path))
    told = capsys.readouterr().err
    assert f"warning: {FIELD}.pictures={path}: 2 of 6 pictures do not decode and are left out: 2.png, 3a.jpg\n" in told
    rows = [json.loads(line) for line in (made.path / "stats.jsonl").read_text().splitlines()]
    assert any("logit_real" in row for row in rows)
    assert not [*(tmp_path / "out/.work/cache").glob("trajectories-*")]
    pipe = load_pipeline(chain.teacher.path)
    with torch.no_grad():
        pixels = [from_uint8(decode(png(number), Size(SIDE, SIDE))) for number in (0, 1, 3, 4)]
        latents = torch.cat([pipe.family.to_latents(pipe.vae, torch.from_numpy(each)) for each in pixels])
    ((found,),) = real_pictures
    assert torch.allclose(found.pictures(torch.arange(4)), latents, atol=2e-3, rtol=2e-3)
    assert found.pool.index is not None and len(found.pool) == 4 and found.pool.index[2] == found.pool.index[3] != found.pool.index[0]
    assert torch.equal(found.pool.cond[found.pool.index[1:2]].tensors["embeds"], found.pool.empty.tensors["embeds"])

    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("these pictures are encoded already"))
    path.rename(tmp_path / "moved")
    moved = recipe_of(tmp_path / "moved")
    assert runs.distill(str(chain.teacher.path), tmp_path / "out", moved).path == made.path  # contents count, not the place
    other = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe_of(tmp_path / "moved", "distill.matching.lr=1e-5"))
    assert "2 of 6 pictures do not decode" in capsys.readouterr().err and digests(other)[TRANSFORMER] != digests(made)[TRANSFORMER]
    (tmp_path / "moved" / "0.txt").write_text("another caption")
    assert prepare(Distill, {"teacher": chain.teacher.path}, moved).settings()["pictures"] != made.manifest.recipe["pictures"]


def test_finetune_with_real_pictures_follows_no_teacher(chain: Chain, tmp_path: Path) -> None:
    settings = [
        f"finetune.matching.adversarial.pictures={shard(tmp_path / 'pictures.tar')}",
        "finetune.matching.node_adversarial=[0, 0, 0, 1]",
    ]
    recipe = micro(*settings, "distill.trajectory.teacher_steps=6", "finetune.allow_worse=1")  # 6 steps would not fit the student's
    tuned = runs.finetune(str(chain.student.path), tmp_path / "out", recipe)
    rows = {row["phase"]: row for row in map(json.loads, (tuned.path / "stats.jsonl").read_text().splitlines())}
    assert "logit_real" in rows["low"] and "logit_real" not in rows["high"]
    assert not [*(tmp_path / "out/.work/cache").glob("trajectories-*")]
    with_pictures, without = (
        runs.plan("finetune", {"student": str(chain.student.path)}, tmp_path / "x", micro(*more)) for more in (settings, ())
    )
    assert with_pictures["disk_bytes"] - without["disk_bytes"] == 5 * 2 * 16 * 8 * 8 + 4 * 4224


def test_latents_are_taken_as_they_are(chain: Chain, tmp_path: Path) -> None:
    shape = prepare(Distill, {"teacher": chain.teacher.path}, micro()).family.latent_shape(
        lambda part: json.loads((chain.teacher.path / part / "config.json").read_text()), Size(SIDE, SIDE)
    )
    file = tmp_path / "latents.safetensors"
    save_file({"latents": torch.randn(5, *shape).to(torch.bfloat16)}, file)
    file.with_suffix(".txt").write_text("a cat\n\na dog\na cat\na bird\n")
    source = source_of(chain.teacher, file)
    assert [picture.caption for picture in source.pictures] == ["a cat", "", "a dog", "a cat", "a bird"]
    made = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe_of(file))
    assert '"logit_real"' in (made.path / "stats.jsonl").read_text()
    file.with_suffix(".txt").write_text("a cat\n")
    told = refused(2, *command(chain.teacher, file, tmp_path / "new"))
    assert "holds 5 latents, and" in told and told.endswith("has 1 lines; write one caption per line")
    save_file({"latents": torch.randn(5, 16, 4, 4), "scale": torch.ones(1)}, file)
    assert "has [5, 16, 4, 4]; give the tensor `latents` [N, 16, 8, 8], on the transformer's scale" in refused(
        2, *command(chain.teacher, file, tmp_path)
    )
    file.write_bytes(b"no tensors")
    assert "is not a whole safetensors file" in refused(3, *command(chain.teacher, file, tmp_path / "new"))


def command(teacher: Artifact, path: Path, out: Path, *more: str) -> list[str | Path]:
    settings = [*MICRO, *ADVERSARY, f"{FIELD}.pictures={path}", *more]
    return ["distill", teacher.path, "--out", out, *(word for setting in settings for word in ("--set", setting))]


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _metadata(row: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda tmp: _text(folder(tmp / "p") / "metadata.jsonl", json.dumps(row)).parent


BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    "missing": (lambda tmp: tmp / "none", (), "is not there; name a folder of pictures, or a .tar, .parquet or .safetensors file"),
    "empty": (lambda tmp: _text(tmp / "note.txt", "none").parent, (), "has no pictures; name a folder of .bmp, .jpeg"),
    "pickle": (lambda tmp: _text(tmp / "latents.pt", ""), (), "has no pictures; name a folder of .bmp"),
    "few": (lambda tmp: folder(tmp / "p"), ("distill.matching.batch=8",), "has 5 pictures, fewer than distill.matching.batch=8"),
    "tar": (lambda tmp: _text(tmp / "p.tar", "no tar" * 200), (), "p.tar cannot be read as a tar without compression"),
    "row": (_metadata({"caption": "a cat"}), (), "metadata.jsonl, line 1 does not name its picture; give its path in the folder"),
    "column": (
        _metadata({"file_name": "0.png", "text": "a cat"}),
        (),
        f"metadata.jsonl, line 1 has no column 'caption'; --set {FIELD}.caption_column=NAME, one of: file_name, text",
    ),
    "list": (_metadata({"file_name": "0.png", "caption": ["a", "b"]}), (), "line 1: column 'caption' holds list, not text; --set"),
    "parquet": (
        lambda tmp: parquet(tmp / "p.parquet"),
        (f"{FIELD}.picture_column=jpg",),
        f"p.parquet has no column 'jpg'; --set {FIELD}.picture_column=NAME, one of: image, caption, id",
    ),
    "numbers": (lambda tmp: parquet(tmp / "p.parquet"), (f"{FIELD}.picture_column=id",), "column 'id' holds int64, not the bytes of"),
    "broken parquet": (lambda tmp: pytest.importorskip("pyarrow") and _text(tmp / "p.parquet", "x"), (), "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_pictures_that_cannot_be_used_are_refused_before_any_work(case: str, chain: Chain, tmp_path: Path) -> None:
    make, settings, message = BAD[case]
    told = refused(2, *command(chain.teacher, make(tmp_path), tmp_path / "out", *settings))
    assert told.startswith(f"{FIELD}.pictures=") and message in told
    assert not (tmp_path / "out").exists()


def test_too_few_pictures_that_decode_end_the_run_before_prompts_are_encoded(chain: Chain, tmp_path: Path) -> None:
    path = folder(tmp_path / "pictures")
    for number in (1, 3):
        (path / f"{number}.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"3 of 5 pictures decode, fewer than a batch of 4; add pictures, or lower distill"):
        runs.distill(str(chain.teacher.path), tmp_path / "out", recipe_of(path))
    assert not [*(tmp_path / "out/.work/cache").glob("prompts-*")]


def test_parquet_without_its_extra_ends_with_the_command_that_installs_it(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "flashgen[data]"' in refused(5, *command(chain.teacher, _text(tmp_path / "p.parquet", ""), tmp_path / "out"))


def test_pictures_without_an_adversarial_term_have_no_effect(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = prepare(Distill, {"teacher": chain.teacher.path}, micro(f"{FIELD}.pictures={tmp_path / 'none'}"))
    assert "has no effect without an adversarial term; --set distill.matching.node_adversarial=[1]" in capsys.readouterr().err
    assert stage.settings() == prepare(Distill, {"teacher": chain.teacher.path}, micro()).settings()


def test_the_plan_counts_latents_captions_and_the_vaes_encoder(chain: Chain, tmp_path: Path) -> None:
    def planned(*settings: str) -> Any:
        stage = prepare(Distill, {"teacher": chain.teacher.path}, micro(*settings))
        plan = stage.plan()
        assert plan is not None
        return plan

    without, real = planned("distill.trajectory.iterations=0"), planned(*ADVERSARY, f"{FIELD}.pictures={folder(tmp_path / 'p')}")
    added = 5 * 2 * 16 * 8 * 8 + 4 * 4224  # fp16 latents, and an embedding per different caption
    assert real.disk - without.disk == real.cached - without.cached == added and real.forwards > without.forwards
    assert real.memory["pictures"]["vae"] > 0 and real.memory["pictures"]["activations"] >= 4 * SIDE**2 and "pictures" not in without.memory
    assert real.work["fp32"] > without.work["fp32"]
