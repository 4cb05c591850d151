"""Drawing from the checkpoints of a distillation, in progress and finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flashgen.artifact.files import read_state, write_state
from flashgen.errors import ArtifactError, UsageError
from flashgen.models.pipeline import load_pipeline
from flashgen.stages.checkpoints import open_checkpoint
from flashgen.training import loop, matching
from flashgen.training.checkpoint import Checkpoint
from flashgen.training.roles import Role
from tests import runs
from tests.cli.command import flashgen
from tests.stages.chain import Chain, micro

KEEP = ("checkpoint.keep=2", "bench.per_task=0", "distill.on_policy.iterations=0", "distill.matching.ema=0.5")
LORA = ("distill.lora.rank=4",)


@pytest.fixture(autouse=True)
def saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)


def picture(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("settings", [(), LORA], ids=["dense", "adapters"])
def test_the_last_checkpoint_of_a_finished_run_draws_what_its_student_draws(
    settings: tuple[str, ...], chain: Chain, tmp_path: Path
) -> None:
    """The student is published in fp16, so a number may be off by one or two; the step before draws something else."""
    recipe = micro(*KEEP, *settings)
    student, last = runs.distill(str(chain.teacher.path), tmp_path / "out", recipe), recipe.distill.matching.iterations
    last += recipe.distill.matching.fake_score_warmup
    assert not [path for path in (tmp_path / "out" / ".work").iterdir() if path.name not in ("cache", "v0001")]
    prompt = ["two red circles on a white background", "--seed", "3"]
    drawn = [flashgen("generate", tmp_path / "out", *prompt, "-o", tmp_path / "student.png")]
    for name in (f"{last}", f"matching/{last - 1:06d}"):
        drawn.append(flashgen("generate", tmp_path / "out", *prompt, "--checkpoint", name, "-o", tmp_path / f"{len(drawn)}.png"))
    assert [done.exit_code for done in drawn] == [0, 0, 0], drawn
    same, before = (abs(picture(tmp_path / f"{i}.png") - picture(tmp_path / "student.png")) for i in (1, 2))
    assert same.max() <= 3
    pipe, checkpoint = load_pipeline(chain.teacher.path), open_checkpoint(tmp_path / "out", str(last))
    checkpoint.load_into(pipe)
    network = pipe.transformer
    weight = network.merged if isinstance(network, Role) else network.state_dict().__getitem__
    for name, value in load_file(next((student.path / "transformer").glob("*.safetensors"))).items():
        torch.testing.assert_close(weight(name).half(), value)
    earlier = load_pipeline(chain.teacher.path)
    open_checkpoint(tmp_path / "out", f"matching/{last - 1}").load_into(earlier)
    assert any(not torch.equal(a, b) for a, b in zip(earlier.transformer.parameters(), network.parameters(), strict=True))
    assert before.shape == same.shape
    assert checkpoint.manifest.digest not in (student.manifest.digest, chain.teacher.manifest.digest)
    assert checkpoint.manifest.sampler == student.manifest.sampler


def test_a_run_in_progress_draws_and_what_is_not_there_is_said_in_one_sentence(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, where: str, **options: object) -> Any:
        if where == "matching fake score step 1":
            raise KeyboardInterrupt
        return loop.descend(*arguments, where=where, **options)  # type: ignore[arg-type]

    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(chain.teacher.path, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(matching, "descend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.distill(str(teacher), out, micro(*KEEP))
    done = flashgen("generate", out, "a red circle", "--checkpoint", "matching/1", "-o", tmp_path / "a.png")
    assert done.exit_code == 0 and "matching/step-000001" in done.stderr and (tmp_path / "a.png").exists()
    done = flashgen("generate", out, "a red circle", "--checkpoint", "999", "-o", tmp_path / "b.png")
    assert done.exit_code == 2 and "there are: matching/1, trajectory/" in done.stderr and "checkpoint.keep=3" in done.stderr
    with pytest.raises(UsageError, match=r"has no \.work; give the folder that holds the versions"):
        open_checkpoint(tmp_path, "1")
    facts = next(out.glob(".work/*/checkpoints/student.state"))
    text = read_state(facts) or b""
    facts.write_bytes(facts.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="is damaged"):
        open_checkpoint(out, "matching/1")
    write_state(facts, json.dumps(json.loads(text) | {"digest": "0" * 64}).encode())
    with pytest.raises(ArtifactError, match=r"is not the artifact that the training of .* began with"):
        open_checkpoint(out, "matching/1")


def test_checkpoints_go_with_the_run_by_default(chain: Chain, tmp_path: Path) -> None:
    runs.distill(str(chain.teacher.path), tmp_path / "out", micro("bench.per_task=0"))
    assert [path.name for path in (tmp_path / "out" / ".work").iterdir()] == ["cache"]
