"""The judge of a world: exact, for the prompts of that world only."""

from __future__ import annotations

from typing import Any

from flashgen.judges.base import Drawn, Judge, Judgement
from flashgen.worlds.base import World


class WorldJudge(Judge):
    """Share of the pictures that show what their prompt says, overall and per task."""

    metric = "composition"

    def __init__(self, world: World) -> None:
        self.world = world

    def identity(self) -> dict[str, Any]:
        """Metric and world."""
        return {"metric": self.metric, "world": self.world.name}

    def judge(self, drawn: Drawn) -> Judgement:
        """Judge a set of pictures. Raises ValueError for a prompt that is not of the world."""
        return self.world.judge(drawn.pictures, drawn.prompts)
