"""The judge of a world, which knows its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashgen.judges.base import Drawn, Judge, Judgement

if TYPE_CHECKING:
    from flashgen.worlds.base import World


class WorldJudge(Judge):
    """Which pictures show what their prompt of `world` asks for; `overall` is the unweighted mean of the tasks' pass rates."""

    metric = "composition"

    def __init__(self, world: World) -> None:
        self.world = world

    def identity(self) -> dict[str, Any]:
        return {"metric": self.metric, "world": self.world.name}

    def judge(self, drawn: Drawn) -> Judgement:
        return self.world.judge(drawn.pictures, drawn.prompts)
