"""docs/recipes.md names every setting exactly once, with the default and the range of its model; links between pages lead somewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types as at
import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from flashgen.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(path, field) of every setting; an optional section is a setting, too."""
    for name, field in model.model_fields.items():
        optional = get_origin(field.annotation) in (Union, UnionType)
        kinds = [k for k in (get_args(field.annotation) if optional else [field.annotation]) if k is not NoneType]
        section = kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None
        if section is None or optional:
            yield prefix + name, field
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")


SETTINGS = dict(settings())


def documented() -> list[tuple[str, str, str]]:
    """(path, default, range) as the page states them; a table with several settings per row gives one entry per setting."""
    entries, head, ranges = [], list[str](), list[str]()
    for line in (ROOT / "docs/recipes.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif head[0] == "setting" and cells[0].startswith("`"):
            entries.append((cells[0].strip("`"), cells[1], cells[2]))
        elif head[0] == "section":
            if cells[0] == "range":
                ranges = cells
            elif cells[0].startswith("`"):
                columns = zip(head[1:], cells[1:], ranges[1:], strict=True)
                entries += [(f"{cells[0].strip('`')}.{name.strip('`')}", default, limits) for name, default, limits in columns]
    return entries


def limits(field: FieldInfo) -> str | None:
    """The range of a setting as the page writes it; None where the page uses words of its own."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    if get_origin(field.annotation) is tuple:
        return f"{_bounds(get_args(get_args(field.annotation)[0])[1].metadata)} each"
    return _bounds(field.metadata) or ("" if field.annotation is bool else None)


def _bounds(metadata: list[Any]) -> str:
    low = next((f">= {m.ge:g}" if isinstance(m, at.Ge) else f"> {m.gt:g}" for m in metadata if isinstance(m, at.Ge | at.Gt)), "")
    high = next((f"<= {m.le:g}" if isinstance(m, at.Le) else f"< {m.lt:g}" for m in metadata if isinstance(m, at.Le | at.Lt)), "")
    if low.startswith(">= ") and high:
        return f"{low[3:]}..{high[3:]}" if high.startswith("<= ") else f"{low[3:]}..<{high[2:]}"
    multiple = next((f"multiples of {m.multiple_of}" for m in metadata if isinstance(m, at.MultipleOf)), "")
    return ", ".join(part for part in (low, high, multiple) if part)


def test_recipes_page_names_every_setting_exactly_once() -> None:
    names: Counter[str] = Counter()
    for name, _, _ in documented():
        below = [path for path in SETTINGS if path.startswith(name[:-1])] if name.endswith(".*") else [name]
        names.update(below or [name])
    assert not {name: count for name, count in names.items() if count > 1}
    assert set(names) == set(SETTINGS)


@pytest.mark.parametrize("entry", documented(), ids=lambda entry: entry[0])
def test_recipes_page_states_default_and_range(entry: tuple[str, str, str]) -> None:
    name, default, said = entry
    if name.endswith(".*"):
        other = default.removeprefix("as ").strip("`")
        for path, field in SETTINGS.items():
            if path.startswith(name[:-1]):
                twin = SETTINGS[path.replace(name[:-2], other, 1)]
                assert (field.default, field.metadata) == (twin.default, twin.metadata), path
        return
    field = SETTINGS[name]
    if field.is_required():
        assert default == "required"
    else:
        annotation: Any = field.annotation
        assert TypeAdapter(annotation).validate_python(yaml.safe_load(default)) == field.default
    expected = limits(field)
    assert expected is None or said == expected


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
