from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashgen.arena.study import PRESETS, SD35_FLASH_RATERS, Settings, Study, build, settings_of
from flashgen.errors import ArtifactError, UsageError
from tests.arena.conftest import write_bench

Make = Callable[..., Study]


def test_exposure_of_pairs_items_and_sides_is_equal(make_study: Make) -> None:
    study = make_study(prompts=10, per_rater=15)
    deck = [c for slot in range(2) for c in study.plan(slot) if c.kind == "pair"]
    assert Counter((c.item, frozenset((c.left, c.right))) for c in deck) == Counter(
        (item, frozenset(pair)) for item in range(10) for pair in study.pairs
    )  # two raters of 15 see each of 30 (pair, item) once
    for slot in range(8):
        main = [c for c in study.plan(slot) if c.kind == "pair"]
        assert set(Counter(frozenset((c.left, c.right)) for c in main).values()) == {5}
        for a, b in study.pairs:
            assert sum((c.left, c.right) == (a, b) for c in main) in (2, 3)


def test_a_rater_who_may_see_everything_sees_everything_once(make_study: Make) -> None:
    study = make_study(prompts=7, per_rater=1000)
    for slot in range(3):
        main = [c for c in study.plan(slot) if c.kind == "pair"]
        assert len(main) == len({(c.item, frozenset((c.left, c.right))) for c in main}) == 21


def test_sides_and_order_differ_between_raters_and_depend_on_the_seed_alone(make_study: Make) -> None:
    study = make_study(per_rater=36)
    orders = [[(c.item, c.left, c.right) for c in study.plan(slot)] for slot in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert len({c.id for slot in range(5) for c in study.plan(slot)}) == sum(len(study.plan(slot)) for slot in range(5))


def test_repeats_swap_the_sides_after_a_while_and_gold_pairs_show_a_spoiled_picture(make_study: Make) -> None:
    study = make_study(per_rater=30, repeats=0.1, gold=0.2)
    for slot in range(5):
        plan = study.plan(slot)
        assert Counter(c.kind for c in plan) == {"pair": 30, "repeat": 3, "gold": 6}
        for i, comparison in enumerate(plan):
            if comparison.kind == "repeat":
                first = next(
                    j for j, c in enumerate(plan) if (c.item, c.left, c.right) == (comparison.item, comparison.right, comparison.left)
                )
                assert i - first >= 5
    item, artifact = study.gold[0]
    pixels, spoiled = (np.asarray(Image.open(study.picture_file(study.picture(item, side)))).astype(int) for side in (artifact, None))
    assert np.abs(pixels - spoiled).mean() > 30


def test_nothing_that_a_rater_gets_names_an_artifact(make_study: Make) -> None:
    study = make_study()
    text = json.dumps(study.page_data(0))
    assert not re.search("alpha|beta|gamma|gold|repeat|pair\\b", text)
    for path in study.pictures.values():
        assert re.fullmatch("[0-9a-f]{18}\\.png", path.name)
        assert b"digest-of" not in path.read_bytes()
    assert {p.name for p in (study.folder / "pictures").iterdir()} == {p.name for p in study.pictures.values()}


def test_pictures_keep_their_pixels(make_study: Make, tmp_path: Path) -> None:
    study = make_study()
    for artifact, name in enumerate(study.artifacts):
        source = Image.open(tmp_path / "bench" / "pictures" / f"{artifact:02d}-{name}" / "0003.png")
        assert np.array_equal(np.asarray(source), np.asarray(Image.open(study.picture_file(study.picture(3, artifact)))))


def test_building_again_keeps_the_study_and_other_settings_are_refused(make_study: Make, tmp_path: Path) -> None:
    study = make_study(per_rater=6)
    before = (study.folder / "study.json").read_bytes()
    build(tmp_path / "bench", study.folder, Settings(per_rater=6))
    assert (study.folder / "study.json").read_bytes() == before
    with pytest.raises(UsageError, match="another folder"):
        build(tmp_path / "bench", study.folder, Settings(per_rater=7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bench, study: (bench / "bench.json").unlink(), "no bench.json"),
        (lambda bench, study: (bench / "bench.json").write_text("{"), "is broken"),
        (lambda bench, study: (bench / "pictures/01-b/0002.png").unlink(), "0002.png is missing"),
        (lambda bench, study: (bench / "pictures/01-b/0002.png").write_bytes(b""), "0002.png is missing or is no picture"),
        (lambda bench, study: (bench / "pictures/00-a/0000.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "is no picture"),
        (lambda bench, study: edit(bench, lambda d: d["results"].pop()), "two artifacts or more"),
        (lambda bench, study: edit(bench, lambda d: d.update(prompts=[])), "no prompts"),
        (lambda bench, study: edit(bench, lambda d: d["results"][0].update(pictures="../../etc")), "outside"),
        (lambda bench, study: (study.mkdir(), (study / "thesis.txt").write_text("x")), "holds no study"),
    ],
)
def test_build_refuses_in_a_sentence(tmp_path: Path, change: Callable[[Path, Path], object], message: str) -> None:
    bench, study = write_bench(tmp_path / "bench", ["a", "b"], 3), tmp_path / "study"
    change(bench, study)
    with pytest.raises((ArtifactError, UsageError), match=re.escape(message)):
        build(bench, study, Settings())
    assert {p.name for p in tmp_path.iterdir()} <= {"bench", "study"} and not (study / "study.json").exists()


def edit(bench: Path, change: Callable[[dict[str, list[dict[str, object]]]], object]) -> None:
    document = json.loads((bench / "bench.json").read_text())
    change(document)
    (bench / "bench.json").write_text(json.dumps(document))


def test_artifacts_of_one_name_get_numbers(make_study: Make) -> None:
    assert make_study("same same other").artifacts == ["00-same", "01-same", "other"]


def test_the_papers_preset_wants_its_prompts_and_seeds_and_judges_each_pair_three_times(tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", ["a", "b"], 3, seeds=2)
    paper = PRESETS["sd35-flash"]
    with pytest.raises(UsageError, match="3 prompts, the study wants 507"):
        build(bench, tmp_path / "study", paper)
    with pytest.raises(UsageError, match="2 seeds for a prompt, the study wants 4"):
        build(bench, tmp_path / "study", settings_of({"prompts": 3}, "sd35-flash"))
    assert 3 * 507 * 4 / paper.per_rater <= SD35_FLASH_RATERS


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="per_rater"):
        settings_of({"per_rater": 0})
    with pytest.raises(UsageError, match="sd35-flash"):
        settings_of({}, "paper")
    assert settings_of({"per_rater": 9}, "sd35-flash").prompts == 507


def test_a_broken_study_is_an_artifact_error(make_study: Make) -> None:
    study = make_study()
    (study.folder / "study.json").write_text('{"version": 1}')
    with pytest.raises(ArtifactError, match="is broken"):
        Study(study.folder)
    with pytest.raises(ArtifactError, match="holds no study"):
        Study(study.folder / "pictures")
