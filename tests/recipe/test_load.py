from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashgen.errors import UsageError
from flashgen.recipe import load as loader
from flashgen.recipe.load import load, names
from flashgen.recipe.schema import Recipe


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    assert load(name).name == name


def test_names_include_the_default_of_the_command_line() -> None:
    assert "shapes-demo" in names()


def test_extends_and_set_layer_in_order(tmp_path: Path) -> None:
    write(tmp_path, "base", "name: base\ndistill: {steps: 8, trajectory: {batch: 3, lr: 1e-3}}\nquantize: {protect: [a, b]}\n")
    child = write(tmp_path, "child", "extends: ./base.yaml\nname: child\ndistill: {trajectory: {batch: 5}}\nquantize: {protect: [c]}\n")
    recipe = load(child, ["distill.trajectory.lr=2e-4", "distill.steps=2", "distill.steps=1"])
    assert (recipe.name, recipe.distill.steps) == ("child", 1), "the last --set wins"
    assert (recipe.distill.trajectory.batch, recipe.distill.trajectory.lr) == (5, 2e-4)
    assert recipe.quantize.protect == ["c"], "lists are replaced, not merged"


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load("shapes-demo", ["distill.steps=2"])
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_extends_finds_a_shipped_recipe_by_name(tmp_path: Path) -> None:
    assert load(write(tmp_path, "mine", "extends: shapes-demo\nname: mine\n")).name == "mine"


@pytest.mark.parametrize(
    ("text", "sets", "message"),
    [
        ("name: a\ndistil: {}\n", [], r"a\.yaml: distil: unknown key, did you mean distill\?"),
        ("name: a\ndistill: {stepz: 2}\n", [], r"a\.yaml: distill\.stepz: unknown key, did you mean steps\?.*Known here: .*trajectory"),
        ("name: a\n", ["distill.lora.rnk=8"], r"distill\.lora\.rnk: unknown key, did you mean rank\?.*Known here: rank, alpha"),
        ("name: a\ndistill: {steps: 0}\n", [], r"a\.yaml: distill\.steps: .*greater than or equal to 1 \(got 0\)"),
        ("name: a\ndistill: {steps: four}\n", [], r"a\.yaml: distill\.steps: .*integer"),
        ("name: a\ndistill:\n", [], r"a\.yaml: distill: .*\(got None\)"),
        ("name: a\ndistill: 3\n", [], r"a\.yaml: distill: "),
        ("name: a\n", ["distill.steps=99"], r"--set distill\.steps=99: distill\.steps: .*less than or equal to 16"),
        ("name: a\n", ["distill.trajectory.lr=.inf"], r"distill\.trajectory\.lr: .*finite number \(got inf\)"),
        ("name: a\n", ["distill.trajectory.node_draws=[.nan]"], r"distill\.trajectory\.node_draws\.0: .*finite number"),
        ("name: a\n", ["distill.x.y=1"], r"--set distill\.x\.y=1: distill\.x: unknown key"),
        ("name: a\n", ["finetune.matching.adversarial.band=[0.2,0.1]"], "band: .*two sizes, the lower first"),
        ("name: a\n", ["nonsense"], "--set nonsense: write it as"),
        ("name: a\n", ["a..b=1"], r"--set a\.\.b=1: write it as"),
        ("name: a\n", ["distill.steps=[1"], "not readable as YAML"),
        ("distill: {steps: 2}\n", [], r"a\.yaml: name: Field required"),
        ("name: a\nname: b\n", [], r"a\.yaml: .*'name' is written twice"),
        ("name: a\nextends: [x, y]\n", [], r"a\.yaml: extends: must be the name or file of one recipe"),
        ("name: a\nextends: none-such\n", [], "no recipe named 'none-such'"),
        ("name: a\nextends: ./none.yaml\n", [], "no recipe file .*none.yaml"),
        ("name: a\nextends: ./a.yaml\n", [], "circle"),
        ("- 1\n", [], r"a\.yaml: a recipe is a mapping"),
        ("", [], r"a\.yaml: a recipe is a mapping"),
        ("a: [\n", [], r"a\.yaml: not readable as YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", [], r"a\.yaml: not readable as YAML"),
    ],
)
def test_a_bad_recipe_names_field_and_source(tmp_path: Path, text: str, sets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(write(tmp_path, "a", text), sets)


OLD_NAMES = {
    "distill.t5_drop=0.5": "distill.encoder_drop",
    "distill.correction.iterations=1": "distill.on_policy",
    "distill.trajectory.watch_every=1": "distill.trajectory.validate_every",
    "distill.matching.watch_every=1": "distill.matching.validate_every",
    "distill.matching.proxy_target=step": "distill.matching.fake_score_target",
    "finetune.matching.proxy_coupling=0.9": "finetune.matching.ida",
    "finetune.matching.proxy_lr=1e-4": "finetune.matching.fake_score_lr",
    "distill.matching.proxy_muon_lr=1e-3": "distill.matching.fake_score_muon_lr",
    "distill.matching.proxy_updates=1": "distill.matching.fake_score_updates",
    "distill.matching.proxy_warmup=1": "distill.matching.fake_score_warmup",
    "quantize.basis_tolerance=1e-3": "quantize.low_rank_tolerance",
    "quantize.repair=true": "quantize.step_scales",
    "teacher.flow.t5_drop=0.4": "teacher.flow.encoder_drop",
}


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_a_setting_by_its_old_name_is_refused_and_told_the_new_one(old: str, new: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("shapes-demo", [old])
    assert str(caught.value) == f"--set {old}: {old.split('=')[0].removesuffix('.iterations')} is now called {new}; write that instead"


def test_every_new_name_is_a_field_that_loads() -> None:
    for old, new in OLD_NAMES.items():
        value = old.split("=")[1]
        load("shapes-demo", [f"{new}={{iterations: {value}}}" if new.endswith("on_policy") else f"{new}={value}"])
    assert {name.rpartition(".")[2] for name in OLD_NAMES.values()} == set(loader.RENAMED.values())


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("distill.strides=[1, 2]", "strides=[] makes them even"),
        ("quantize={scheme: nf4, method: hqq}", "leave them out"),
        ("quantize={method: hqq, symmetric: true}", "set symmetric to false"),
        ("quantize.group=channel", "without budget and low_rank_tolerance"),
        ("distill={trajectory: {node_draws: [0]}}", "give one a number above 0"),
        ("distill.on_policy={iterations: 1, prompts: 4096}", "are the first of trajectory.prompts=2048"),
    ],
)
def test_an_error_about_a_section_ends_without_the_sections_contents(tmp_path: Path, setting: str, end: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, "a", "name: a\n"), [setting])
    message = str(caught.value)
    assert message.endswith(end) and len(message.splitlines()) == 1
    assert "{" not in message.removeprefix(f"--set {setting}") and "got" not in message


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: a\nb: [\n", 3), ("name: a\nname: b\n", 2), ("name: a\nb: !!python/object/apply:os.system [ls]\n", 2), ("name: a\nb: @\n", 2)],
    ids=["unfinished", "twice", "code", "sign"],
)
def test_an_error_of_the_yaml_itself_is_one_sentence_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, "a", text))
    message = str(caught.value)
    assert f"line {line}" in message and "a.yaml" in message
    assert "^" not in message and "<unicode string>" not in message and "\n" not in message


BOMB = "name: a\na0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
MERGES = "name: a\na0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name: 2024-13-45", "no timestamp"), ("name: !!timestamp x", "no timestamp"), ("name: " + "9" * 5000, "5000 digits"),
        ("name: 0x" + "f" * 50, "a number above 1000000000000"), ("name: !!float x", "no float"), ("name: !!bool x", "no bool"),
        ("name: !!binary x", "base64"), ("name: !!omap x", "expected a sequence"), ("[a]: b", "unhashable"), ("name: !x y", "!x"),
        ('name: "a\\0b"', "no file can hold"), ('name: "\\ud800"', "no file can hold"), ("name: " + "[" * 300_000, "more than 50 sections"),
        ("- " * 300, "more than 50 sections"),
        ("name: &a [*a]", "a part of"), (BOMB, "more than 5000 values"), (MERGES, "more than 5000 values"),
        ("".join(f"a{i}: 1\n" for i in range(9_000)), "more than 5000 values"),
    ],
    ids=lambda value: value[:24],
)  # fmt: skip
def test_what_no_recipe_holds_is_refused_in_one_line_and_at_once(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"not readable as YAML.*{why}") as caught:
        load(write(tmp_path, "a", text))
    assert "\n" not in str(caught.value)
    if text.startswith("name: ") and text.count("\n") == 0:
        with pytest.raises(UsageError, match=f"--set name=.*not readable as YAML.*{why}"):
            load("shapes", [f"name={text.removeprefix('name: ')}"])


def test_an_alias_repeats_what_it_names(tmp_path: Path) -> None:
    recipe = load(
        write(tmp_path, "a", "name: &n a\ndistill: {matching: &m {batch: 3}}\nfinetune: {matching: {<<: *m, prompts: 5}}\njudge: *n\n")
    )
    assert (recipe.finetune.matching.batch, recipe.finetune.matching.prompts, recipe.judge) == (3, 5, "a")


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a{99999999999}", "(" * 5000])
def test_a_bad_regular_expression_is_refused_when_the_recipe_is_read(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"distill\.lora\.targets: .*must be a regular expression"):
        load("shapes", [f"distill.lora.targets='{pattern}'"])


@pytest.mark.parametrize("name", ["/dev/zero.yaml", "/dev/null/x", "x" * 300, f"./{'x' * 300}", "fifo.yaml", "folder.yaml"])
def test_a_recipe_is_a_plain_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.yaml")
    os.mkdir("folder.yaml")
    with pytest.raises(UsageError, match="no recipe"):
        load(name)


def test_an_error_names_the_layer_that_brought_the_value(tmp_path: Path) -> None:
    write(tmp_path, "base", "name: base\ndistill: {steps: 0, trajectory: {batch: 0}}\n")
    child = write(tmp_path, "child", "extends: ./base.yaml\ndistill: {trajectory: {batch: -1}}\n")
    with pytest.raises(UsageError) as caught:
        load(child)
    first, second = str(caught.value).splitlines()
    assert "base.yaml: distill.steps" in first
    assert "child.yaml: distill.trajectory.batch" in second


def test_an_unknown_name_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UsageError, match=r"did you mean shapes-demo.*There are: .*shapes-demo"):
        load("shapes-dmo")


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAX_BYTES", 10)
    with pytest.raises(UsageError, match="more than 10 bytes"):
        load(write(tmp_path, "a", "name: aaaaaaaaaaa\n"))
