"""distill with several sizes of training pictures: every size is trained, a run resumes, the plan counts them; and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.families.conditioning import Conditioning
from flashgen.models.pipeline import load_pipeline
from flashgen.pixels import Size, from_uint8
from flashgen.stages import pictures
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.picture_files import decode, proportions
from flashgen.stages.planning import Plan
from flashgen.stages.tracking import step_costs
from flashgen.training import loop, matching, regression
from flashgen.training.cache import Replay
from flashgen.training.checkpoint import Checkpoint
from flashgen.training.pictures import RealPictures
from flashgen.training.rollout import Rollout, roll_out
from tests import runs
from tests.cli.command import refused
from tests.stages.chain import MICRO, TRANSFORMER, Chain, digests, micro

SQUARE, WIDE = (16, 8, 8), (16, 8, 12)
TWO = (
    "distill.sizes=[64, 96x64]", "distill.trajectory.iterations=4", "distill.on_policy.iterations=4", "distill.on_policy.batch=4",
    "distill.on_policy.prompts=7", "distill.matching.iterations=4", "distill.matching.node_adversarial=[1]",
    "distill.matching.node_trajectory=[0.5]", "distill.matching.fake_score_updates=1",
)  # fmt: skip


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    rows = map(json.loads, (artifact.path / "stats.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in ("time", "machine")} for row in rows]


def test_both_sizes_are_trained_and_a_resumed_run_is_the_same(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, cached, judged, at, pictures_at = list[torch.Size](), list[torch.Size](), list[torch.Size](), Replay.at, Replay.pictures

    def rolled(net_at: Any, noise: Tensor, *rest: Any) -> Rollout:
        rounds.append(noise.shape[1:])
        return roll_out(net_at, noise, *rest)

    def watched(self: Replay, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        cached.append(self.starts.shape[2:])
        return at(self, rows, node)

    def real(self: Replay, rows: Tensor) -> Tensor:
        judged.append(self.ends.shape[2:])
        return pictures_at(self, rows)

    def interrupted(*arguments: Any, where: str, **options: Any) -> tuple[Tensor, Tensor]:
        if where in stops:
            stops.remove(where)
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)

    whole = runs.distill(str(chain.teacher.path), tmp_path / "whole", micro(*TWO))
    assert {row["phase"] for row in rows_of(whole)} == {"trajectory", "on_policy", "matching"}
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)
    for module in (matching, regression):
        monkeypatch.setattr(module, "descend", interrupted)
    monkeypatch.setattr(matching, "roll_out", rolled)
    monkeypatch.setattr(Replay, "at", watched)
    monkeypatch.setattr(Replay, "pictures", real)
    stops = {"on_policy step 2", "matching step 2"}
    while stops:
        with pytest.raises(KeyboardInterrupt):
            runs.distill(str(chain.teacher.path), tmp_path / "out", micro(*TWO))
    resumed = runs.distill(str(chain.teacher.path), tmp_path / "out", micro(*TWO))
    assert "resuming" in capsys.readouterr().err
    assert digests(resumed) == digests(whole) and rows_of(resumed) == rows_of(whole)
    assert resumed.manifest.sampler is not None and resumed.manifest.sampler.size_px == Size(64, 64)
    assert len(rounds) == 5 and set(rounds) == set(judged) == {SQUARE, WIDE}
    assert cached[-4:] == rounds[:2] + rounds[3:] and set(cached[:-4]) == {SQUARE, WIDE}  # the third round was interrupted, and drew again


def test_the_sizes_share_out_the_trajectories_prompts(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = dict[str, list[Replay]]()

    def kept(student: nn.Module, replay: Replay, *arguments: Any) -> None:
        seen[arguments[5]] = [replay, *arguments[8]]

    monkeypatch.setattr(regression, "regress", kept)
    runs.distill(str(chain.teacher.path), tmp_path, micro(*TWO, "distill.matching.iterations=0", "distill.trajectory.prompts=15"))
    assert [(len(replay), replay.starts.shape[2:]) for replay in seen["trajectory"]] == [(8, SQUARE), (7, WIDE)]
    assert [len(replay) for replay in seen["on_policy"]] == [8 + 4, 7 + 4]  # 7 of 15 prompts
    square, wide = (set((replay.pool.index if replay.pool.index is not None else torch.empty(0)).tolist()) for replay in seen["trajectory"])
    assert square and wide and not square & wide


def test_one_size_has_the_settings_that_it_had(tiny_teacher: Artifact) -> None:
    one, two = (prepare(Distill, {"teacher": tiny_teacher.path}, micro(*more)) for more in ((), TWO))
    assert "sizes" not in one.settings() and two.settings()["sizes"] == [64, "96x64"]


def test_the_plan_counts_the_memory_of_the_largest_size_and_the_mean_of_the_rest(tiny_teacher: Artifact) -> None:
    def prepared(*more: str) -> Distill:
        stage = prepare(
            Distill, {"teacher": tiny_teacher.path}, micro("distill.on_policy.iterations=1", "distill.on_policy.prompts=8", *more)
        )
        assert isinstance(stage, Distill)
        return stage

    def plan(stage: Distill) -> Plan:
        return stage.plan_with(0)

    stages = [prepared(f"distill.{size}") for size in ("size_px=64", "size_px=128x64", "sizes=[64, 128x64]")]
    small, large, both = map(plan, stages)
    assert both.memory == large.memory != small.memory and both.forwards == small.forwards
    assert both.disk == (small.disk + large.disk) / 2 and both.cached == (small.cached + large.cached) / 2
    assert both.work["fp32"] == pytest.approx((small.work["fp32"] + large.work["fp32"]) / 2)
    costs = [step_costs(stage)["matching"].multiply_adds for stage in stages]
    assert costs[2] == pytest.approx((costs[0] + costs[1]) / 2) and costs[0] < costs[1]


BAD = {
    "size_px=64 and sizes=[64, 96x64] do not go together; set size_px=null or sizes=[]": ["sizes=[64, 96x64]", "size_px=64"],
    "sizes=[64, 96x64, 64] names a size twice; name each once": ["sizes=[64, 96x64, 64x64]"],
    "learns the steps of a student of one size, not of sizes=[64, 96x64]; set sizes=[]": ["sizes=[64, 96x64]", "follow=start", "start=x"],
    "trajectory.prompts=1 are too few for 2 sizes; give each size one or more": ["sizes=[64, 96x64]", "trajectory.prompts=1"],
    "distill.sizes=100x64: this model draws sides that are multiples of 16 px up to 512": ["sizes=[64, 100x64]"],
    "'wide' is not a picture size": ["sizes=[64, wide]"],
}


@pytest.mark.parametrize("message", BAD)
def test_sizes_that_do_not_fit_are_refused(message: str, tiny_teacher: Artifact, tmp_path: Path) -> None:
    settings = (word for setting in (*MICRO, *(f"distill.{value}" for value in BAD[message])) for word in ("--set", setting))
    assert message in refused(2, "distill", tiny_teacher.path, "--out", tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


PICTURES = ("distill.sizes=[64, 128x64]", "distill.trajectory.iterations=0", "distill.matching.node_adversarial=[1]")
SIDES = [(90, 40), (80, 80), (40, 90), (70, 80), (100, 40)]  # width and height: of 128x64 are the first and the last


def folder(path: Path) -> Path:
    path.mkdir()
    for number, (width, height) in enumerate(SIDES):
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8))
        picture.save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"picture {number}")
    return path


def with_pictures(path: Path, *more: str) -> Any:
    return micro(*PICTURES, f"distill.matching.adversarial.pictures={path}", "distill.matching.batch=2", *more)


def test_each_real_picture_is_drawn_in_the_size_of_the_nearest_proportions(
    chain: Chain,
    real_pictures: list[list[RealPictures]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = folder(tmp_path / "pictures")
    (path / "5.png").write_text("no picture")
    made = runs.distill(str(chain.teacher.path), tmp_path / "out", with_pictures(path, "distill.matching.iterations=6"))
    assert "1 of 6 pictures do not decode and are left out: 5.png" in capsys.readouterr().err
    assert any("logit_real" in row for row in rows_of(made))
    pipe = load_pipeline(chain.teacher.path)
    for pictures_of_size, size, numbers in zip(real_pictures[0], (Size(64, 64), Size(64, 128)), ((1, 2, 3), (0, 4)), strict=True):
        pixels = [from_uint8(decode((path / f"{number}.png").read_bytes(), size)) for number in numbers]
        with torch.no_grad():
            latents = torch.cat([pipe.family.to_latents(pipe.vae, torch.from_numpy(each)) for each in pixels])
        assert torch.allclose(pictures_of_size.pictures(torch.arange(len(numbers))), latents, atol=2e-3, rtol=2e-3)
        assert len(pictures_of_size.pool) == len(numbers)
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("these pictures are encoded already"))
    other = runs.distill(str(chain.teacher.path), tmp_path / "out", with_pictures(path, "distill.matching.lr=1e-5"))
    assert digests(other)[TRANSFORMER] != digests(made)[TRANSFORMER]


def test_a_turned_picture_has_the_proportions_that_are_shown() -> None:
    for orientation, shown in ((1, 2.25), (3, 2.25), (6, 1 / 2.25)):
        stream, turned = io.BytesIO(), Image.Exif()
        turned[0x0112] = orientation
        Image.new("RGB", (90, 40)).save(stream, "PNG", exif=turned)
        assert proportions(stream.getvalue()) == shown


def test_sizes_of_the_same_proportions_share_pictures(tiny_teacher: Artifact, tmp_path: Path) -> None:
    stage = prepare(Distill, {"teacher": tiny_teacher.path}, with_pictures(folder(tmp_path / "p"), "distill.sizes=[64, 128x64, 96]"))
    assert isinstance(stage, Distill) and stage.pictures is not None
    assert stage.pictures.rows_by_size() == {Size(64, 64): [1, 2, 3], Size(64, 128): [0, 4], Size(96, 96): [1, 2, 3]}
    fewer = prepare(Distill, {"teacher": tiny_teacher.path}, with_pictures(tmp_path / "p"))
    assert isinstance(fewer, Distill)
    assert stage.plan_with(0).disk - fewer.plan_with(0).disk == 5 * 2 * 16 * (12 * 12) / 2  # a picture may be of either proportions


def test_too_few_pictures_for_a_size_and_latents_are_refused(chain: Chain, tmp_path: Path) -> None:
    path = folder(tmp_path / "p")
    with pytest.raises(UsageError, match=r"2 of 5 pictures are nearest to the proportions of size 128x64, fewer than a batch of 3; add"):
        runs.distill(str(chain.teacher.path), tmp_path / "out", with_pictures(path, "distill.matching.batch=3"))
    (tmp_path / "latents.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"latents\.safetensors holds latents of one size; name pictures, or set distill\.sizes=\[\]"):
        runs.distill(str(chain.teacher.path), tmp_path / "out", with_pictures(tmp_path / "latents.safetensors"))
