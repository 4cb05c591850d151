"""Command lines, recipes, manifests and weights that nobody would write on purpose, as hypothesis strategies.

`outcome` runs a command line in this process; whatever would take long is cut off where it begins (`stopped`), so that borders are tried
and neither trainings nor networks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from flashgen.errors import MachineError
from flashgen.recipe.load import FOLDERS, names
from flashgen.recipe.schema import Recipe
from tests.cli.command import flashgen

STAGES = ("quantize", "distill", "finetune", "restructure-encoder", "export")
ODD = [
    "",
    " ",
    "-",
    "--",
    "..",
    "/",
    "\0",
    "\ud800",
    "\x1b[2J",
    "ä",
    "\U0001d54f",
    "NaN",
    "-1",
    "0",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "9" * 400 + "GB",
    "9" * 5000 + "x24GB",
    "x" * 300,
    "=",
    ",",
    "@v0001",
    "null",
]


def fields(model: type[BaseModel] = Recipe, before: str = "") -> Iterator[str]:
    """Names of all settings of a recipe, with dots."""
    for name, field in model.model_fields.items():
        yield before + name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, f"{before}{name}.")


FIELDS = sorted(fields())
TEXT = st.one_of(st.sampled_from(ODD), st.text(max_size=12))
NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([2**31, 2**62, 2**63, 10**400, 1e308, 1e-308]))
VALUES = st.recursive(
    st.one_of(
        NUMBERS, TEXT, st.booleans(), st.none(), st.sampled_from(["rtn", "gptq", "hqq", "nf4", "channel", 16, 32, 64, 512, "4.5", "9MB"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def mostly(right: list[str], odd: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[str]:
    """One of `right`, or now and then something odd."""
    return st.integers(0, 7).flatmap(lambda number: odd if number == 7 else st.sampled_from(right))


@st.composite
def settings(draw: st.DrawFn) -> str:
    """A value of `--set`: most name a setting that exists."""
    name = draw(mostly(FIELDS))
    value = draw(VALUES)
    text = draw(TEXT) if draw(st.integers(0, 4)) == 0 else written(value)
    return f"{name}{draw(st.sampled_from(['=', '=', '=', '=', '', '==']))}{text}"


def written(value: Any) -> str:
    """`value` as YAML that fits into one line."""
    try:
        return json.dumps(value)
    except ValueError:
        return repr(value)


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """A recipe file: sections with odd values, a shipped recipe with a damage, or any text."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.one_of(st.binary(max_size=60), st.text(alphabet="[]{}:,&*a1!|>-? \n\t'\"#%<", max_size=60).map(str.encode)))
    if kind == 1:
        file = next(folder / f"{draw(st.sampled_from(names()))}.yaml" for folder in FOLDERS if folder.is_dir())
        text = bytearray(file.read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(text)))
            text[place : place + draw(st.integers(0, 9))] = draw(
                st.one_of(TEXT.map(lambda t: t.encode(errors="replace")), st.binary(max_size=4))
            )
        return bytes(text)
    data: dict[str, Any] = {"name": draw(st.one_of(st.just("fuzz"), VALUES))}
    if draw(st.booleans()):
        data["extends"] = draw(st.one_of(st.sampled_from([*names(), "./recipe.yaml", "/dev/zero"]), VALUES))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=4)):
        section, (*parts, last) = data, name.split(".")
        for part in parts:
            section = section.setdefault(part, {}) if isinstance(section.get(part, {}), dict) else {}
        section[last] = draw(VALUES)
    return yaml.safe_dump(data, allow_unicode=draw(st.booleans())).encode(errors="replace") if kind == 2 else written(data).encode()


@st.composite
def manifests(draw: st.DrawFn, manifest: dict[str, Any]) -> bytes:
    """manifest.json with odd values, or damaged text."""
    if draw(st.integers(0, 3)) == 0:
        text = bytearray(json.dumps(manifest).encode())
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 40))] = draw(st.binary(max_size=9))
        return bytes(text)
    changed = json.loads(json.dumps(manifest))
    for _ in range(draw(st.integers(1, 3))):
        inside = changed
        while True:
            key = draw(st.sampled_from(sorted(inside))) if isinstance(inside, dict) else draw(st.integers(0, len(inside) - 1))
            below = inside[key]
            if not isinstance(below, dict | list) or not below or draw(st.integers(0, 2)) == 0:
                inside[key] = draw(VALUES)
                break
            inside = below
    return json.dumps(changed).encode()


OPTIONS = {  # of commands, with values that are right
    "--seed": ["0", "7"], "--device": ["cpu", "auto"], "--on": ["8x80GB", "rtx4090"], "--judge": ["teacher"], "--scheme": ["nf4", "groups"],
    "--budget": ["4.5", "900MB"], "--target": ["onnx", "web", "gguf"], "--mode": ["prune", "zeros", "compact"], "--json": [], "--debug": [],
    "--verify": [], "--force": [], "--recipe": ["shapes", "sd35-medium"], "--memory": ["2GB"], "--engine": ["onnxruntime"],
    "--steps": ["4"], "--size": ["64"], "--like": ["tiny"], "--layers": ["1"], "--world": ["shapes"], "--threads": ["1"],
}  # fmt: skip
STAGE = ["--seed", "--device", "--on", "--json", "--force", "--recipe", "--judge"]
OF = {
    "quantize": [*STAGE, "--scheme", "--budget"], "distill": STAGE, "finetune": STAGE, "restructure-encoder": STAGE,
    "export": ["--seed", "--target", "--json"], "show": ["--verify", "--json"], "bench": ["--size", "--steps", "--threads", "--recipe"],
    "generate": ["--seed", "--memory", "--engine", "--steps", "--size", "--device"], "teacher": ["--like", "--layers", "--world", "--seed"],
    "arena": ["--json"], "none": ["--seed"],
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn, folder: Path, artifacts: list[Path], manifest: dict[str, Any]) -> list[str]:
    """Arguments of `flashgen`; `folder` gets a recipe, a prompt file and an artifact with an odd manifest."""
    (folder / "odd").mkdir(exist_ok=True)
    others = ["shapes", "none", str(folder), str(folder / "odd"), "/dev/null", "hf:a/b", f"{artifacts[0]}@v0001", f"{artifacts[0]}@v9999"]
    command = draw(
        st.sampled_from([*STAGES, *STAGES, "show", "show", "generate", "generate", "generate", "bench", "teacher", "arena", "none"])
    )
    which = draw(mostly([*map(str, artifacts), *map(str, artifacts), *others]))
    if which == str(folder / "odd"):
        (folder / "odd" / "manifest.json").write_bytes(draw(manifests(manifest)))
    line = [command, which]
    if command == "teacher":
        line = [command, *draw(st.sampled_from([["train"], ["random"], ["import", which]])), "--plan"]
    if command == "restructure-encoder":
        line += ["--mode", draw(mostly(OPTIONS["--mode"]))]
    if command == "arena":
        line = [command, draw(st.sampled_from(["build", "page", "collect", "analyse"])), which]
    if command == "generate":
        line += draw(_generate(folder))
    if command != "show":
        line += [
            "--out",
            draw(mostly([str(folder / "out" / "a.png")], st.one_of(st.sampled_from(["/dev/null/a.png", "/proc/a.png", "."]), TEXT))),
        ]
    if command in STAGES:
        line += ["--plan"]
    if command in (*STAGES, "bench") and draw(st.booleans()):
        (folder / "recipe.yaml").write_bytes(draw(recipes()))
        line += ["--recipe", str(folder / "recipe.yaml")]
    if command in (*STAGES, "bench", "arena"):
        for setting in draw(st.lists(settings(), max_size=2)):
            line += ["--set", setting]
    for option in draw(st.lists(st.sampled_from(OF[command]), max_size=2, unique=True)):
        line += [option, *([draw(mostly(OPTIONS[option], st.one_of(NUMBERS.map(str), TEXT)))] if OPTIONS[option] else [])]
    if draw(st.integers(0, 9)) == 9:
        line.insert(draw(st.integers(0, len(line))), draw(TEXT))
    return [os.fsdecode(word.replace("\0", "").encode(errors="surrogatepass")) for word in line]  # as a system passes arguments


@st.composite
def _generate(draw: st.DrawFn, folder: Path) -> list[str]:
    (folder / "prompts.txt").write_bytes(draw(st.one_of(st.binary(max_size=40), TEXT.map(lambda text: text.encode(errors="replace")))))
    (folder / "picture.png").write_bytes(draw(st.binary(max_size=40)))
    line = draw(st.lists(mostly(["a red circle"]), min_size=1, max_size=2))
    options = {
        "--prompt-file": ["prompts.txt", "none", "."], "--from-png": ["picture.png"], "--init-image": ["picture.png", "."],
        "--seeds": ["1,2-3", "3-1", "0-99999999999"], "--steps": ["4", "0", "9999999999"], "--guidance": ["2", "nan", "1e9"],
        "--size": ["64", "64x0", "70000"], "--strength": ["0.5", "nan"], "--batch": ["1", "0"], "--checkpoint": ["1"], "--negative": [""],
    }  # fmt: skip
    for option in draw(st.lists(st.sampled_from(sorted(options)), max_size=3)):
        value = draw(mostly(options[option]))
        line += [option, str(folder / value) if value in ("prompts.txt", "picture.png", ".") else value]
    return line


def _stop(*given: Any, **more: Any) -> Any:
    raise MachineError("the long part would begin here")


@contextmanager
def stopped() -> Iterator[None]:
    """Nothing is drawn, measured or asked of the hub; estimates of time take none."""
    with (
        patch("flashgen.stages.generate._drawer", _stop), patch("flashgen.stages.bench.bench", _stop),
        patch("flashgen.stages.base.execute", _stop),
        patch("flashgen.stages.planning._seconds_each", lambda number: 1e-12), patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
    ):  # fmt: skip
        yield


def outcome(line: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of a command line. Raises AssertionError for a bug: exit code 1, or an exception that left the command."""
    result = flashgen(*line)
    left = result.exception if not isinstance(result.exception, SystemExit) else None
    assert result.exit_code in (0, 2, 3, 4, 5) and left is None, (result.exit_code, line, result.stderr[-600:], left)
    return result.exit_code, result.stderr
