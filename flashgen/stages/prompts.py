"""Prompts of the user: from text, .jsonl, .csv, .tsv and .parquet files, and from data sets of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flashgen.artifact.files import sha256
from flashgen.artifact.hub import HUB
from flashgen.artifact.manifest import hash_json
from flashgen.errors import UsageError
from flashgen.recipe.schema import PromptsRecipe, Recipe
from flashgen.stages.rows import Row, is_unicode, json_rows, jsonl_rows, parquet_rows, require_columns, table_rows, text_lines

UNJUDGED_PICTURES = 8  # prompts that are drawn where no judge scores pictures
OPTION = "prompts_file="


@dataclass(frozen=True)
class OwnPrompts:
    """Prompts of a recipe: those to train on, with a weight each or None, and those that are never trained on."""

    training: list[str]
    weights: list[float] | None
    held_out: list[str]

    @property
    def validation(self) -> list[str]:
        """Prompts of validation pictures: the held-out ones, or the training prompts where none are held out."""
        return self.held_out or self.training


def read_prompts(path: Path, option: str = "--prompt-file ") -> list[str]:
    """The prompts of a text file, one per line; empty lines are skipped. Raises UsageError when there is none."""
    prompts = [line.strip() for line in text_lines(path, option) if line.strip()]
    if not prompts:
        raise UsageError(f"{option}{path} has no prompts; write one per line")
    return prompts


def own_prompts(recipe: Recipe) -> OwnPrompts | None:
    """The prompts of `prompts_file`, read as the section `prompts` says; None without a file.

    Held out are the distinct prompts with the lowest digests, so that neither the seed nor the order of the rows decides which, and every
    copy of such a prompt. Raises UsageError for what cannot be read, and ImportError without the extra that a format needs.
    """
    if recipe.prompts_file is None:
        return None
    how, name = recipe.prompts, f"prompts_file={recipe.prompts_file}"
    pairs = _prompts(_rows(recipe.prompts_file, how), name, how)
    distinct = sorted({prompt for prompt, _ in pairs}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if how.held_out >= len(distinct):
        raise UsageError(
            f"{name} has {len(distinct)} different prompts, and prompts.held_out={how.held_out} leaves none to train on; "
            f"--set prompts.held_out={len(distinct) // 10}"
        )
    held_out = distinct[: how.held_out]
    apart = set(held_out)
    pairs = [pair for pair in pairs if pair[0] not in apart]
    weights = [weight for _, weight in pairs] if how.weight is not None else None
    if weights is not None and not 0 < sum(weights) < math.inf:
        total = "are all 0" if not any(weights) else "are too large for their sum"
        raise UsageError(f"{name}: the weights in column {how.weight!r} {total}, so nothing can be drawn; --set prompts.weight=null")
    return OwnPrompts([prompt for prompt, _ in pairs], weights, held_out)


def prompts_key(recipe: Recipe, own: OwnPrompts) -> dict[str, Any]:
    """Prompts in the key of a run: the contents of their file or data set, and the settings that read them."""
    how = recipe.prompts.model_dump(exclude_defaults=True, exclude={"cache_gib"})
    assert recipe.prompts_file is not None
    contents = hash_json(asdict(own)) if str(recipe.prompts_file).startswith(HUB) else sha256(recipe.prompts_file)
    return {"prompts_file": contents} | ({"prompts_read": how} if how else {})


def _prompts(rows: Iterable[tuple[str, Row]], name: str, how: PromptsRecipe) -> list[tuple[str, float]]:
    """(prompt, weight) of the first `limit` rows with a prompt; rows come with their place, for messages."""
    pairs = []
    for place, row in islice(rows, how.limit or None):
        require_columns(row, {"prompts.column": how.column, "prompts.weight": how.weight}, f"{name}{place}")
        prompt, weight = row[how.column], 1.0 if how.weight is None else row[how.weight]
        if not isinstance(prompt, str | None):
            raise UsageError(f"{name}{place}: column {how.column!r} holds {type(prompt).__name__}, not text; name another, prompts.column=")
        if prompt is not None and not is_unicode(prompt):
            raise UsageError(f"{name}{place}: half of a surrogate pair, which is no character; write the file again in UTF-8")
        if prompt is not None and prompt.strip():
            pairs.append((prompt.strip(), _weight(weight, f"{name}{place}: column {how.weight!r}")))
    if not pairs:
        raise UsageError(f"{name} has no prompts; write one per line, or name the column that has them with --set prompts.column=NAME")
    return pairs


def _weight(value: Any, where: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UsageError(f"{where} holds {value!r}; a weight is a number of at least 0")
    return weight


def _rows(source: Path, how: PromptsRecipe) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of every row of the file or data set `source`."""
    if str(source).startswith(HUB):
        return _hub(str(source).removeprefix(HUB), how)
    match source.suffix.lower():
        case ".jsonl":
            return jsonl_rows(source, OPTION)
        case ".json":
            return json_rows(source, OPTION)
        case ".csv" | ".tsv" as suffix:
            return table_rows(source, OPTION, "," if suffix == ".csv" else "\t")
        case ".parquet":
            return parquet_rows(source, OPTION, [name for name in (how.column, how.weight) if name is not None])
        case _:
            return (("", {how.column: line}) for line in text_lines(source, OPTION) if line.strip())


def _hub(name: str, how: PromptsRecipe) -> Iterator[tuple[str, Row]]:
    """Rows of the data set OWNER/NAME, or of its configuration in OWNER/NAME/CONFIG, streamed; columns other than the named stay there."""
    import datasets

    owner, _, rest = name.partition("/")
    repository, _, configuration = rest.partition("/")
    try:
        stream = datasets.load_dataset(f"{owner}/{repository}", configuration or None, split=how.split, streaming=True)
        wanted = [column for column in (how.column, how.weight) if column is not None]
        if stream.column_names and set(wanted) <= set(stream.column_names):
            stream = stream.select_columns(wanted)  # pictures are not decoded
        for row in stream:
            yield "", row
    except (OSError, ValueError, RuntimeError) as error:
        mend = "check the name, prompts.split, the network and, for a gated data set, HF_TOKEN"
        raise UsageError(f"prompts_file={HUB}{name} cannot be read ({' '.join(str(error).split())}); {mend}") from error
