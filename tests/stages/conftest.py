from __future__ import annotations

from typing import Any

import pytest

from flashgen.stages import pictures
from flashgen.training.pictures import RealPictures
from tests.stages.chain import Chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def real_pictures(monkeypatch: pytest.MonkeyPatch) -> list[list[RealPictures]]:
    """The real pictures that each `distill` of a test reads, by size."""
    read, real = list[list[RealPictures]](), pictures.real_pictures

    def recorded(*arguments: Any) -> list[RealPictures]:
        read.append(real(*arguments))
        return read[-1]

    monkeypatch.setattr("flashgen.stages.distill.real_pictures", recorded)
    return read
