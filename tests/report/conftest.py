from __future__ import annotations

from pathlib import Path

import pytest

from flashgen.report import write_report
from tests.report import handmade


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench of 6 artifacts and 24 prompts with noisy pictures of 512 px, and its report."""
    out = tmp_path_factory.mktemp("report") / "bench"
    handmade.write(out)
    write_report(out)
    return out
