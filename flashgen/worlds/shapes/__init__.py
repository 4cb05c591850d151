"""The embedded world: pictures of coloured shapes, a grammar of prompts, an exact judge of GenEval's six tasks, and a small teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashgen.judges.base import Judgement, Pictures
from flashgen.worlds.base import TeacherData, World
from flashgen.worlds.shapes.scene import TASKS, parse, prompt_set, sample_request


class Shapes(World):
    """Prompts from the grammar of `scene`, judged by the classical vision of `verify`."""

    name = "shapes"
    recipe = "shapes-demo"
    tasks = TASKS

    def teacher(self) -> Path:
        return Path(__file__).parent / "teacher"

    def training_prompts(self, rng: np.random.Generator, count: int) -> list[str]:
        return [sample_request(rng).caption() for _ in range(count)]

    def prompts(self, seed: int, per_task: int) -> list[str]:
        return [request.caption() for request in prompt_set(seed, per_task)]

    def judge(self, pictures: Pictures | Sequence[Pictures], prompts: Sequence[str]) -> Judgement:
        from flashgen.worlds.shapes.verify import composition, judge

        requests = [parse(prompt) for prompt in prompts]
        passed = [judge(picture, request).passed for picture, request in zip(pictures, requests, strict=True)]
        return Judgement(np.array(passed, np.float64), composition(passed, requests))

    def teacher_data(self) -> TeacherData:
        from flashgen.worlds.shapes.data import ShapesData

        return ShapesData()
