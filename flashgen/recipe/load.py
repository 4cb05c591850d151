"""Reading recipes: YAML by name or file, one parent through `extends:`, `--set` on top."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from flashgen.errors import UsageError
from flashgen.recipe.schema import Recipe
from flashgen.recipe.text import parse

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "_recipes", PACKAGE.parent / "recipes")  # installed from a wheel, run from a checkout
MAX_BYTES = 1 << 20
RENAMED = {  # settings of 0.2, and what they are called now
    "t5_drop": "encoder_drop",
    "watch_every": "validate_every",
    "correction": "on_policy",
    "proxy_target": "fake_score_target",
    "proxy_coupling": "ida",
    "proxy_lr": "fake_score_lr",
    "proxy_muon_lr": "fake_score_muon_lr",
    "proxy_updates": "fake_score_updates",
    "proxy_warmup": "fake_score_warmup",
    "basis_tolerance": "low_rank_tolerance",
    "repair": "step_scales",
}


def load(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe; raises UsageError that names the field and the file (or `--set`) it came from."""
    layers = [*_layers(_find(name_or_file, Path.cwd())), *(_override(text) for text in overrides)]
    merged: dict[str, Any] = {}
    for _, data in layers:
        merged = _merge(merged, data)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(dict(item), layers) for item in error.errors())) from error


def names() -> list[str]:
    """Names of the recipes that flashgen brings."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


def _find(name_or_file: str | Path, beside: Path) -> Path:
    text = str(name_or_file)
    if "/" in text or "\\" in text or text.endswith((".yaml", ".yml")):
        path = beside / text
        if _is_file(path):
            return path
        raise UsageError(f"no recipe file {path}; name an existing file or one of: {', '.join(names())}")
    for folder in FOLDERS:
        if _is_file(folder / f"{text}.yaml"):
            return folder / f"{text}.yaml"
    close = difflib.get_close_matches(text, names(), 1)
    raise UsageError(f"no recipe named {text!r}{f', did you mean {close[0]}?' if close else ';'} There are: {', '.join(names())}")


def _is_file(path: Path) -> bool:
    """Return True for a plain file: a pipe or device would be read without end."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no system has a name of this length, or with this character
        return False


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, contents) from the oldest ancestor to `path` itself."""
    if path.resolve() in above:
        raise UsageError(f"{path}: `extends` goes in a circle; remove one of the links")
    data = _read(path)
    parent = data.pop("extends", None)
    if parent is None:
        return [(str(path), data)]
    if not isinstance(parent, str):
        raise UsageError(f"{path}: extends: must be the name or file of one recipe, not {parent!r}")
    return [*_layers(_find(parent, path.parent), (*above, path.resolve())), (str(path), data)]


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UsageError(f"{path}: more than {MAX_BYTES} bytes, this is no recipe")
    try:
        data = parse(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not readable as YAML: {error}; write it in UTF-8") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, this is {type(data).__name__}")
    return data


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """`a.b=c` as a layer {a: {b: c}}."""
    key, sign, value = text.partition("=")
    source = f"--set {text if len(text) <= 200 else text[:200] + '...'}"
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UsageError(f"{source}: write it as --set section.field=value")
    try:
        data = parse(value)
    except ValueError as error:
        raise UsageError(f"{source}: the value is {error}") from error
    for part in reversed(parts):
        data = {part: data}
    return source, data


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, everything else (lists too) is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(item: dict[str, Any], layers: list[tuple[str, dict[str, Any]]]) -> str:
    loc: tuple[str | int, ...] = item["loc"]
    source = next((name for name, data in reversed(layers) if _contains(data, loc)), layers[-1][0])
    field = ".".join(map(str, loc))
    if item["type"] != "extra_forbidden":
        plain = isinstance(item["input"], str | int | float | bool | None)
        return f"{source}: {field}: {item['msg']}" + (f" (got {item['input']!r})" if plain else "")
    if (new := RENAMED.get(str(loc[-1]))) is not None:
        return f"{source}: {field} is now called {'.'.join(map(str, (*loc[:-1], new)))}; write that instead"
    fields = list(_fields(loc[:-1]))
    close = difflib.get_close_matches(str(loc[-1]), fields, 1)
    return f"{source}: {field}: unknown key{f', did you mean {close[0]}?' if close else '.'} Known here: {', '.join(fields)}"


def _contains(data: Any, loc: Sequence[str | int]) -> bool:
    for part in loc:
        if not isinstance(data, dict):
            return True  # a list or a plain value was given where the field lies: this layer replaced it whole
        if part not in data:
            return False
        data = data[part]
    return True


def _fields(loc: Sequence[str | int]) -> Iterator[str]:
    """Names of the fields that the model at `loc` knows."""
    model: Any = Recipe
    for part in loc:
        annotation = getattr(model, "model_fields", {})[part].annotation
        model = next((kind for kind in get_args(annotation) if kind is not NoneType), annotation)  # of an optional section the section
    if isinstance(model, type) and issubclass(model, BaseModel):
        yield from model.model_fields
