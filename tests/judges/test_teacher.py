"""The judge `teacher`: the numbers of its definitions, and wrong pictures in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from flashgen.errors import UsageError
from flashgen.judges.base import Drawn, Judgement, Pictures
from flashgen.judges.teacher import TeacherJudge, diversity, saturation, sharpness
from flashgen.worlds.shapes.render import render
from flashgen.worlds.shapes.scene import prompt_set, realise

REQUESTS = [request for request in {request.caption(): request for request in prompt_set(0, 2)}.values() for _ in range(2)]
PROMPTS = [request.caption() for request in REQUESTS]
SEEDS = list(range(len(PROMPTS)))
calls: list[int] = []


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
    """True scenes in place of a teacher's pictures."""
    calls.append(len(prompts))
    requests = dict(zip(PROMPTS, REQUESTS, strict=True))
    return np.stack([render(realise(requests[p], np.random.default_rng(s))) for p, s in zip(prompts, seeds, strict=True)])


RIGHT = draw(PROMPTS, SEEDS)


def judged(pictures: Pictures) -> Judgement:
    return TeacherJudge(draw, "digest").judge(Drawn(pictures, PROMPTS, SEEDS))


def test_the_teachers_own_pictures_are_at_distance_0_and_alike_in_all_parts() -> None:
    judgement = judged(RIGHT)
    assert judgement.values is not None and not judgement.values.any()
    assert judgement.scores == {"overall": 0, "diversity": 1, "saturation": 1, "sharpness": 1}


def test_wrong_pictures_are_further_away_and_a_collapse_is_seen() -> None:
    noise = np.random.default_rng(0).integers(0, 256, RIGHT.shape, np.uint8)
    near = judged(np.clip(RIGHT.astype(int) + 3, 0, 255).astype(np.uint8))
    wrong = {"another prompt's": np.roll(RIGHT, 2, 0), "noise": noise, "black": np.zeros_like(RIGHT)}
    found = {name: judged(pictures) for name, pictures in wrong.items()}
    assert all(near.overall < judgement.overall for judgement in found.values())
    assert found["black"].scores["saturation"] == found["black"].scores["sharpness"] == found["black"].scores["diversity"] == 0
    assert found["noise"].scores["sharpness"] > 5
    twice = judged(np.repeat(RIGHT[::2], 2, 0))  # one picture for both seeds
    assert twice.scores["diversity"] == 0 and near.scores["diversity"] > 0.95
    judge = TeacherJudge(draw, "digest")
    assert judge.better(near.overall) > judge.better(found["noise"].overall)


def test_distance_is_the_rms_difference_of_averaged_pictures() -> None:
    flat = np.full((1, 128, 64, 3), 51, np.uint8)
    checks = flat.copy()
    checks[:, ::2, ::2] += 40  # averages to 61
    judge = TeacherJudge(lambda prompts, seeds: flat, "digest")
    judgement = judge.judge(Drawn(checks, ["a"], [0]))
    assert judgement.overall == pytest.approx(10 / 255)
    assert set(judgement.scores) == {"overall"}  # one grey, flat picture has no diversity, saturation or sharpness


def test_saturation_and_sharpness_are_those_of_their_definitions() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2] = (200, 100, 150)
    assert saturation(picture) == pytest.approx(0.25)
    point = np.zeros((5, 5, 3), np.uint8)
    point[2, 2] = 10
    assert sharpness(point) == pytest.approx(np.var([-40, 10, 10, 10, 10, 0, 0, 0, 0]))
    assert sharpness(picture[:2]) == 0


def test_diversity_is_within_prompts_where_one_was_drawn_twice() -> None:
    a, b, c = (np.full((2, 2, 3), x) for x in (0.0, 0.2, 0.8))
    assert diversity([a, b, c], ["x", "x", "y"]) == pytest.approx(0.2)
    assert diversity([a, b, c], ["x", "y", "z"]) == pytest.approx((0.2 + 0.8 + 0.6) / 3)
    assert diversity([a], ["x"]) is None


def test_the_teacher_draws_once_per_request() -> None:
    judge = TeacherJudge(draw, "digest")
    del calls[:]
    for _ in range(3):
        judge.judge(Drawn(RIGHT, PROMPTS, SEEDS))
    judge.judge(Drawn(RIGHT[:1], PROMPTS[:1], SEEDS[:1]))
    assert calls == [len(PROMPTS), 1]
    assert judge.identity() == {"metric": "teacher_distance", "teacher": "digest"}


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UsageError, match="got no pictures"):
        TeacherJudge(draw, "digest").judge(Drawn(RIGHT[:0], [], []))
    with pytest.raises(UsageError, match="of one size, not 32x64 and 64x64 px"):
        judged(RIGHT[:, :, :32])
