"""YAML as plain data, within limits: what a recipe or `--set` holds is built from scalars, lists and mappings and from nothing else."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_NODES = 5_000  # scalars, lists and mappings; an alias counts as all that it repeats
MAX_DEPTH = 50
MAX_DIGITS = 100
MAX_COUNT = 10**12  # steps, samples or bytes
TOO_DEEP = f"more than {MAX_DEPTH} sections or brackets within each other"


def parse(text: str) -> Any:
    """The data that `text` holds. Raises ValueError, with a message of one line, for anything that is not plain YAML within the limits."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"not readable as YAML: {error.problem}{line}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Plain data only; a key written twice is an error, since one of the two would have no effect."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes in an anchored node, by its id

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Scan an opening bracket. Raises ScannerError where too many are open: PyYAML's time grows with their square."""
        if self.flow_level > MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises ComposerError where there are too many, counted as if every alias were written out, or too deep ones."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        before = self._count
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, f"*{event.anchor} repeats what it is a part of", mark)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
        if self._count > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values, this is no recipe", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node. Raises ConstructorError for text that is no value of its type, and for text that no file name can hold."""
        kind = node.tag.rpartition(":")[2]
        if isinstance(node, yaml.ScalarNode) and kind != "str" and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a value of type {kind} with {len(node.value)} digits", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # PyYAML's constructors raise what int(), datetime() and dictionaries raise
            raise yaml.constructor.ConstructorError(None, None, f"a value that is no {kind}: {error}", node.start_mark) from error
        if isinstance(value, int) and abs(value) > MAX_COUNT:
            raise yaml.constructor.ConstructorError(None, None, f"a number above {MAX_COUNT}", node.start_mark)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(None, None, "a text with a character that no file can hold", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError for a key that is written twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {str(key.value)!r} is written twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
