from __future__ import annotations

import pytest

from flashgen.artifact.store import Artifact
from tests.device import handmade


@pytest.fixture(scope="session")
def handmade_device(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A device artifact of no known family (tests/device/handmade.py)."""
    return handmade.publish(tmp_path_factory.mktemp("artifacts") / "handmade")
