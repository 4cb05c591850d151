"""restructure-encoder: what takes the large encoder's place, the floor, and prompts from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgen.artifact.draft import Origin, begin
from flashgen.artifact.store import Artifact, versions
from flashgen.errors import NumericsError, UsageError
from tests import runs
from tests.stages.chain import Chain, linked, micro


def test_a_compact_encoder_takes_the_place_of_t5(chain: Chain, tmp_path: Path) -> None:
    made = runs.restructure(str(chain.finetuned.path), tmp_path / "compact", micro(), mode="compact")
    assert linked(chain.finetuned, made) == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler",
    }  # fmt: skip
    sampler, size = made.manifest.sampler, made.manifest.metrics["encoder_bytes"]
    assert sampler is not None and (sampler.encoder, sampler.tokens["t5"]) == ("compact", 16)
    assert size["after"] == sum(f.size for f in made.manifest.files if f.path.startswith("text_encoder_3/")) < size["before"]
    device = runs.export(str(made.path), tmp_path / "device", micro())
    assert device.manifest.metrics["psnr_db"]["text_encoder_3"] >= 60


def scored(student: Artifact, out: Path, overall: float) -> Artifact:
    """The student with another validation score."""
    draft = begin(out, Origin("student", "finetune", "sd3", "shapes", {}, 0, student.manifest.parents))
    draft.link_tree(student.path, ".")
    return draft.publish(student.manifest.sampler, {"composition": {"overall": overall}})


def test_a_student_below_the_floor_is_not_published(chain: Chain, tmp_path: Path) -> None:
    source = str(scored(chain.finetuned, tmp_path / "scored", 1.0).path)
    with pytest.raises(NumericsError, match=r"below the floor of 1\.000"):
        runs.restructure(source, tmp_path / "zeros", micro("restructure.floor=1"), mode="zeros")
    assert versions(tmp_path / "zeros") == []
    runs.restructure(source, tmp_path / "zeros", micro("restructure.floor=0"), mode="zeros")


@pytest.mark.parametrize("setting", ["bench.per_task=0", "restructure.floor=0"])
def test_without_a_judge_or_a_floor_nothing_is_refused(
    setting: str, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(scored(chain.finetuned, tmp_path / "scored", 1.0).path)
    made = runs.restructure(source, tmp_path / "zeros", micro("restructure.floor=1", setting), mode="zeros")
    told = "restructure.floor is not applied" in capsys.readouterr().err
    assert told == (setting == "bench.per_task=0")
    assert (made.manifest.metrics["composition"] == "not judged") == told


@pytest.mark.parametrize("mode", ["zeros", "prune", "compact"])
def test_a_restructured_student_is_not_restructured_again(mode: str, chain: Chain, tmp_path: Path) -> None:
    source = chain.zeros if mode != "zeros" else chain.prune
    with pytest.raises(UsageError, match=rf"is restructured already \(mode {source.path.parent.name}\)"):
        runs.restructure(str(source.path), tmp_path / "out", micro(), mode=mode)
    assert not (tmp_path / "out").exists()


def test_prompts_of_ones_own(chain: Chain, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a lighthouse\n\nan old boat\n")
    recipe = micro().model_copy(update={"prompts_file": file})
    made = [runs.restructure(str(chain.student.path), tmp_path / "slim", recipe, mode="prune").path.name for _ in range(2)]
    file.write_text("a lighthouse\n")
    made.append(runs.restructure(str(chain.student.path), tmp_path / "slim", recipe, mode="prune").path.name)
    assert made == ["v0001", "v0001", "v0002"]  # other prompts, another student
    file.write_text("\n")
    with pytest.raises(UsageError, match=r"prompts_file=.* has no prompts"):
        runs.distill(str(chain.teacher.path), tmp_path / "student", recipe)
