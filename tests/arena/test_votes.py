from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.arena.study import Study
from flashgen.arena.votes import NameTakenError, counted, judge_votes, line_of, opened, read
from flashgen.errors import ArtifactError, MachineError, UsageError

Make = Callable[..., Study]
TOKEN = "a" * 32


def test_votes_survive_and_the_last_vote_on_a_comparison_counts(make_study: Make) -> None:
    study = make_study()
    with opened(study) as votes:
        rater = votes.join("Anna", TOKEN)
        first, second = study.plan(rater.slot)[:2]
        assert votes.vote("Anna", first, "left", 1.5)
        assert not votes.vote("Anna", first, "left", 9.0)  # a retry
        assert votes.vote("Anna", second, "tie", None) and votes.vote("Anna", first, "right", 2.0)
    with opened(study) as votes:
        assert votes.of("Anna") == {first.id: "right", second.id: "tie"}
        assert votes.join("anna ", TOKEN) == rater
    assert len((study.folder / "votes.jsonl").read_text().splitlines()) == 4
    assert [row["choice"] for row in counted(study)] == ["right", "tie"]


def test_a_vote_is_on_the_disk_before_it_is_acknowledged(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study, synced = make_study(), []
    with opened(study) as votes:
        comparison = study.plan(votes.join("Anna", TOKEN).slot)[0]
        monkeypatch.setattr("flashgen.arena.votes.os.fsync", lambda handle: synced.append(read(study.folder / "votes.jsonl")[-1]["kind"]))
        votes.vote("Anna", comparison, "left", 1.0)
    assert synced == [comparison.kind]


@pytest.mark.parametrize("cut", [1, 2, 30, "middle"])
def test_a_file_cut_in_its_last_line_loses_that_vote_alone(make_study: Make, cut: int | str, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study()
    path = study.folder / "votes.jsonl"
    with opened(study) as votes:
        plan = study.plan(votes.join("Anna", TOKEN).slot)
        for comparison in plan[:3]:
            votes.vote("Anna", comparison, "left", 1.0)
    content, second = path.read_bytes(), plan[1].id.encode()
    path.write_bytes(content.replace(second, second[::-1]) if cut == "middle" else content[: -int(cut)])
    lost = {1: set(), "middle": {plan[1].id}}.get(cut, {plan[2].id})  # without its end of line only, a vote is still whole
    with opened(study) as votes:
        assert votes.of("Anna").keys() == {c.id for c in plan[:3]} - lost
        for comparison in plan[:4]:
            votes.vote("Anna", comparison, "left", 1.0)
    number = {"middle": 3}.get(str(cut), 4)
    assert (f"line {number} is incomplete or damaged" in capsys.readouterr().err) == bool(lost)
    assert {row["comparison"] for row in counted(study)} == {c.id for c in plan[:4]}


def test_a_full_disk_leaves_no_half_line(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study()
    with opened(study) as votes:
        plan = study.plan(votes.join("Anna", TOKEN).slot)

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("flashgen.arena.votes.os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                votes.vote("Anna", plan[0], "left", 1.0)
        assert votes.of("Anna") == {} and votes.vote("Anna", plan[0], "left", 1.0)
    assert len(read(study.folder / "votes.jsonl")) == 2


def test_two_raters_of_one_name_are_told_apart(make_study: Make) -> None:
    study = make_study()
    with opened(study) as votes:
        votes.join("Anna", TOKEN)
        with pytest.raises(NameTakenError, match="choose another name"):
            votes.join("  ANNA", "b" * 32)
        assert votes.join("Anna B", "b" * 32).slot == 1


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\x00b", "judge:clip", "Judge: me"])
def test_names_that_nobody_may_have(make_study: Make, name: str) -> None:
    with opened(make_study()) as votes, pytest.raises(UsageError, match="choose another name"):
        votes.join(name, TOKEN)


def test_a_study_has_one_writer(make_study: Make) -> None:
    study = make_study()
    with opened(study), pytest.raises(MachineError, match="another process serves"), opened(study):
        pass


def test_unknown_choices_and_unwanted_ties_are_refused(make_study: Make) -> None:
    study = make_study(ties=False)
    with opened(study) as votes:
        comparison = study.plan(votes.join("Anna", TOKEN).slot)[0]
        for choice in ("tie", "up"):
            with pytest.raises(UsageError, match="a vote is left, right"):
                votes.vote("Anna", comparison, choice, 1.0)


def test_a_judge_votes_under_its_label(make_study: Make) -> None:
    study = make_study("alpha beta", prompts=3)
    assert judge_votes(study, "clip", {"alpha": [1, 2, 3], "beta": [3, 2, 1]}, higher_is_better=False) == 3
    assert [(row["rater"], row["choice"]) for row in counted(study)] == [("judge:clip", c) for c in ("left", "tie", "right")]
    with pytest.raises(UsageError, match="no score per picture of beta"):
        judge_votes(study, "clip", {"alpha": [1, 2, 3], "beta": [1]})


def test_no_votes_are_an_error(make_study: Make) -> None:
    with pytest.raises(ArtifactError, match="no votes yet"):
        counted(make_study())


def test_a_line_tells_of_any_changed_byte(tmp_path: Path) -> None:
    line = line_of({"kind": "slot", "slot": 1, "ü": "\n"}).encode()
    path = tmp_path / "v.jsonl"
    path.write_bytes(line)
    assert read(path) == [{"kind": "slot", "slot": 1, "ü": "\n"}]
    for i in range(len(line) - 1):
        path.write_bytes(line[:i] + bytes([line[i] ^ 1]) + line[i + 1 :])
        assert read(path) == []
