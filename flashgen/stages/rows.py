"""Rows of text, .json, .jsonl, .csv, .tsv and .parquet files, with messages for what cannot be read.

`option` precedes the file in messages, as in `prompts_file=`. Rows come with their place, for messages, too.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashgen.errors import UsageError

Row = Mapping[str, Any]
HALF = re.compile("[\ud800-\udfff]")
LONGEST_LINE = 1 << 20  # characters
LARGEST_JSON = 1 << 30  # the same: such a file is in memory as a whole


def check_plain(path: Path, option: str) -> None:
    """Raises UsageError for a pipe, a device or a folder, which would be read without end or not at all."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{option}{path} is no plain file; write what it gives to a file and name that")


def text_lines(path: Path, option: str, longest: int = LONGEST_LINE) -> Iterator[str]:
    """Lines of a text file in UTF-8, with their ends. Raises UsageError for what cannot be read and for a line of `longest` characters."""
    try:
        check_plain(path, option)
        with path.open(encoding="utf-8-sig", newline="") as file:
            while line := file.readline(longest):
                if len(line) == longest:
                    raise UsageError(f"{option}{path} has a line of {longest} characters or more; write one prompt per line")
                yield line
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}{path} cannot be read as text ({error}); name a file in UTF-8") from error


def is_unicode(text: str) -> bool:
    """Return True unless `text` has half characters: bytes of a command line, or escapes of JSON, that are no UTF-8."""
    return not HALF.search(text)


def jsonl_rows(path: Path, option: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of every line that is not empty. Raises UsageError for a line that is no JSON object."""
    for number, line in enumerate(text_lines(path, option), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{option}{path}, line {number} is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{option}{path}, line {number} is no JSON object; write one per line, as in " + '{"prompt": "a cat"}')
        yield f", line {number}", row


def json_rows(path: Path, option: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of every item of a JSON list, or of the list `annotations` of an object, as MS-COCO's captions are.

    Raises UsageError for anything else.
    """
    try:
        data = json.loads("".join(text_lines(path, option, LARGEST_JSON)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option}{path} is not JSON ({error}); write the file again") from error
    items = data.get("annotations") if isinstance(data, dict) else data
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UsageError(f"{option}{path} is no JSON list of objects, nor an object with such a list under 'annotations'; use .jsonl")
    yield from ((f", item {number}", item) for number, item in enumerate(items, 1))


def table_rows(path: Path, option: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of every line of a table whose first line names the columns. Raises UsageError for broken quotes.

    A cell of a .tsv file may go on behind its closing quote, all of which is text then: PartiPrompts has `"G I G G L E" painted ...`.
    """
    lines = text_lines(path, option)
    if delimiter == "\t":
        lines = (_escaped(line) for line in lines)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True, restval="")
    try:
        for row in reader:
            row.pop(None, None)  # cells beyond the header
            yield f", line {reader.line_num}", row
    except csv.Error as error:
        raise UsageError(
            f"{option}{path} cannot be read behind line {reader.line_num} ({error}); double the quotes inside of cells"
        ) from error


def _escaped(line: str) -> str:
    """A line of a .tsv file, in which cells that begin with a quote and end behind the closing one are quoted as a whole."""
    end = line[len(line.rstrip("\r\n")) :]
    cells = [
        '"' + cell.replace('"', '""') + '"' if cell.startswith('"') and not cell.endswith('"') and cell.count('"') % 2 == 0 else cell
        for cell in line.rstrip("\r\n").split("\t")
    ]
    return "\t".join(cells) + end


@contextmanager
def open_parquet(path: Path, option: str) -> Iterator[Any]:
    """`path` as pyarrow's ParquetFile. Raises UsageError for what cannot be read inside, and ImportError without pyarrow."""
    check_plain(path, option)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{option}{path} cannot be read as parquet ({error}); write the file again") from error


def parquet_rows(path: Path, option: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row; of `columns` alone where the file has all of them."""
    with open_parquet(path, option) as file:
        wanted = list(columns) if set(columns) <= set(file.schema_arrow.names) else None  # all of them, for the message
        for batch in file.iter_batches(columns=wanted):
            yield from (("", row) for row in batch.to_pylist())


def require_columns(columns: Iterable[str], wanted: Mapping[str, str | None], where: str) -> None:
    """Raises UsageError unless every column in `wanted`, whose keys are the settings that name them, is one of `columns`."""
    for setting, column in wanted.items():
        if column is not None and column not in columns:
            raise UsageError(f"{where} has no column {column!r}; --set {setting}=NAME, one of: {', '.join(map(str, columns))}")
