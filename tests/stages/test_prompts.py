"""Prompts of the user's own: formats, columns, weights, what is held out, and what is refused with one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashgen.artifact.store import Artifact
from flashgen.errors import UsageError
from flashgen.recipe.schema import PromptsRecipe, Recipe
from flashgen.stages import report, rows
from flashgen.stages.base import prepare
from flashgen.stages.distill import Distill
from flashgen.stages.prompts import OwnPrompts, own_prompts
from tests.cli.command import refused

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat", "w": 1},
    {"prompt": " two, dogs ", "w": 0},
    {"prompt": "", "w": 5},
    {"prompt": "a bird", "w": 3},
]
LISTED = ["a cat", "two, dogs", "a bird"]
CSV = 'w,prompt\n1,a cat\n0,"two, dogs"\n5,\n3,a bird\n'


def recipe_of(file: Path | str, **how: Any) -> Recipe:
    return Recipe(name="own", prompts_file=Path(file), prompts=PromptsRecipe(**how))


def own(file: Path | str, **how: Any) -> OwnPrompts:
    found = own_prompts(recipe_of(file, **how))
    assert found is not None
    return found


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """The same rows in every format that needs no extra."""
    texts = {
        "json": json.dumps({"info": {}, "annotations": ROWS}),
        "txt": "\ufeffa cat\r\n\n two, dogs \na bird",
        "jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
        "csv": "\ufeff" + CSV,
        "tsv": CSV.replace('"two, dogs"', "two; dogs").replace(",", "\t").replace(";", ","),
    }
    for suffix, text in texts.items():
        (tmp_path / f"rows.{suffix}").write_text(text, encoding="utf-8")
    yield {suffix: tmp_path / f"rows.{suffix}" for suffix in texts}


def test_quotes_in_a_tsv_file_may_be_text(tmp_path: Path) -> None:
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text('Prompt\tCategory\n"G I G G L E" painted on a wall\tArt\n"two\nlines, ""quoted"""\tArt\nthe word "hi"\tArt\n')
    assert own(file, column="Prompt").training == ['"G I G G L E" painted on a wall', 'two\nlines, "quoted"', 'the word "hi"']


@pytest.mark.parametrize("text", ["{", "3", '{"annotations": 3}', "[1, 2]"])
def test_json_that_is_no_list_of_rows_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UsageError, match=r"rows\.json is (no|not) JSON"):
        own(tmp_path / "rows.json")


def test_the_same_rows_are_read_from_every_format(files: dict[str, Path]) -> None:
    for suffix, file in files.items():
        assert own(file) == OwnPrompts(LISTED, None, []), suffix
        if suffix != "txt":
            assert own(file, weight="w") == OwnPrompts(LISTED, [1, 0, 3], []), suffix
            assert own(file, limit=2).training == LISTED[:2]
    assert own_prompts(Recipe(name="none")) is None


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "other": b"x"} for row in ROWS]), tmp_path / "rows.parquet")
    assert own(tmp_path / "rows.parquet", weight="w") == OwnPrompts(LISTED, [1, 0, 3], [])
    with pytest.raises(UsageError, match=r"has no column 'caption'; --set prompts\.column=NAME, one of: prompt, w, other"):
        own(tmp_path / "rows.parquet", column="caption")
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match="cannot be read as parquet"):
        own(tmp_path / "rows.parquet")


def test_a_data_set_of_the_hub_is_streamed_by_column(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked, load = [], datasets.load_dataset

    def local(name: str, configuration: str | None, **options: Any) -> Any:
        asked.append((name, configuration, options))
        return load("json", data_files={"train": str(files["jsonl"])}, split="train", streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert own("hf:some/captions/large", weight="w") == OwnPrompts(LISTED, [1, 0, 3], [])
    assert asked == [("some/captions", "large", {"split": "train", "streaming": True})]
    with pytest.raises(UsageError, match=r"has no column 'caption'.* one of: prompt, w"):
        own("hf:some/captions", column="caption")

    def absent(*_: object, **__: object) -> Any:
        raise FileNotFoundError("Dataset 'some/captions' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(UsageError, match=r"prompts_file=hf:some/captions cannot be read \(Dataset .*HF_TOKEN"):
        own("hf:some/captions")


@pytest.mark.parametrize(("file", "module"), [("rows.parquet", "pyarrow"), ("hf:some/captions", "datasets")])
def test_a_format_without_its_extra_ends_with_the_command_that_installs_it(
    file: str, module: str, outside_teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    told = refused(5, "distill", outside_teacher.path, "--recipe", "sd35-medium", "--set", f"prompts_file={file}", "-o", tmp_path / "out")
    assert module in told and 'pip install "flashgen[data]"' in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "how", "message"),
    [
        ("p.csv", CSV, {"column": "caption"}, r"p\.csv, line 2 has no column 'caption'; --set prompts\.column=NAME, one of: w, prompt$"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', {}, r"p\.jsonl, line 2 has no column 'prompt'; .* one of: text$"),
        ("p.csv", CSV, {"weight": "score"}, r"has no column 'score'; --set prompts\.weight=NAME, one of: w, prompt$"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', {}, r"p\.jsonl, line 3 is not JSON \(.*write one object per line"),
        ("p.jsonl", '["a cat"]', {}, r"line 1 is no JSON object"),
        ("p.jsonl", '{"prompt": 3}', {}, r"line 1: column 'prompt' holds int, not text"),
        ("p.csv", "prompt,w\na cat,many\n", {"weight": "w"}, r"line 2: column 'w' holds 'many'; a weight is a number of at least 0"),
        ("p.csv", "prompt,w\na cat,-1\n", {"weight": "w"}, r"line 2: column 'w' holds '-1'"),
        ("p.csv", "prompt,w\na cat,0\n", {"weight": "w"}, r"weights in column 'w' are all 0"),
        ("p.csv", 'prompt\n"a cat" x\n', {}, r"p\.csv cannot be read behind line 1 .*quotes inside of cells"),
        ("p.csv", "", {}, r"prompts_file=.*p\.csv has no prompts"),
        ("p.jsonl", "\n", {}, r"prompts_file=.*p\.jsonl has no prompts"),
        ("p.txt", b"\xff\xfe\x00", {}, r"cannot be read as text .*UTF-8"),
        ("p.jsonl", b'{"prompt": "\xff"}', {}, r"cannot be read as text .*UTF-8"),
        ("p.txt", "a\nb\na\n", {"held_out": 2}, r"has 2 different prompts, and prompts\.held_out=2 leaves none to train on"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_refused_with_one_sentence(
    name: str, text: str | bytes, how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as caught:
        own(tmp_path / name, **how)
    assert "\n" not in str(caught.value)


def test_held_out_prompts_are_never_trained_on_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(texts + texts[:20]))
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts)))
    a, b = own(tmp_path / "a.txt", held_out=10), own(tmp_path / "b.txt", held_out=10)
    assert a.held_out == b.held_out == a.validation and len(a.held_out) == 10
    assert set(a.training) | set(a.held_out) == set(texts) and not set(a.training) & set(a.held_out)
    assert len(a.training) + sum(1 + (texts.index(text) < 20) for text in a.held_out) == 60
    assert own(tmp_path / "a.txt", held_out=3).held_out == a.held_out[:3]
    assert own(tmp_path / "a.txt").validation == own(tmp_path / "a.txt").training == texts + texts[:20]


def stage_of(teacher: Artifact, recipe: Recipe) -> Distill:
    stage = prepare(Distill, {"teacher": teacher.path}, recipe)
    assert isinstance(stage, Distill)
    return stage


def test_a_stage_trains_by_weight_and_validates_on_what_is_held_out(outside_teacher: Artifact, files: dict[str, Path]) -> None:
    stage = stage_of(outside_teacher, recipe_of(files["csv"], weight="w"))
    drawn = Counter(stage.training_prompts(4000, 0))
    assert drawn["two, dogs"] == 0 and 2.4 < drawn["a bird"] / drawn["a cat"] < 3.6
    assert stage.training_prompts(50, 1) == stage.training_prompts(50, 1) != stage.training_prompts(50, 2)
    held = stage_of(outside_teacher, recipe_of(files["csv"], held_out=2))
    assert held.prompts is not None and report.grid_prompts(held, 0) == held.prompts.held_out and held.num_validation_pictures == 2
    assert set(held.training_prompts(100, 0)) == set(LISTED) - set(held.prompts.held_out)


def test_how_prompts_are_read_makes_a_new_run_and_its_defaults_do_not(outside_teacher: Artifact, files: dict[str, Path]) -> None:
    plain = stage_of(outside_teacher, recipe_of(files["csv"])).settings()
    assert "prompts_read" not in plain and plain == stage_of(outside_teacher, recipe_of(files["csv"], column="prompt")).settings()
    assert stage_of(outside_teacher, recipe_of(files["csv"], weight="w")).settings() == plain | {"prompts_read": {"weight": "w"}}


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_prompts_are_read_from_plain_files_only(suffix: str, kind: str, tmp_path: Path) -> None:
    """A pipe would be waited for, and /dev/zero read until the memory is full."""
    file = tmp_path / f"prompts.{suffix}"
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case _:
            file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"prompts_file=.* is no plain file"):
        own(file)
    assert "is no plain file" in refused(2, "generate", "shapes", "--prompt-file", file, "--out", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("suffix", "content", "why"),
    [
        ("txt", b"\xff\xfea cat", "a file in UTF-8"),
        ("txt", bytes(rows.LONGEST_LINE), "a line of 1048576 characters or more"),
        ("jsonl", rb'{"prompt": "\ud800"}', "line 1: half of a surrogate pair"),
        ("json", b"[" * 100_000, "is not JSON"),
    ],
    ids=["not UTF-8", "endless line", "surrogate", "brackets"],
)
def test_hostile_prompts_are_refused_with_one_sentence(suffix: str, content: bytes, why: str, tmp_path: Path) -> None:
    file = tmp_path / f"prompts.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        own(file)
