"""The family of `tests/families/packed`, which no environment has installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashgen import families
from flashgen.families.base import Family

FOLDER = Path(__file__).parent / "packed"


@pytest.fixture(scope="module")
def packed() -> Iterator[Family]:
    """The family `packed` as if its package were installed, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setenv("PYTHONPATH", str(FOLDER), prepend=os.pathsep)
        families.get.cache_clear()
        yield families.get("packed")
    families.get.cache_clear()
