"""Training data of the shapes world's teacher: captions with their meaning, and rendered pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashgen.judges.base import Pictures
from flashgen.worlds.base import TeacherData
from flashgen.worlds.shapes.render import render
from flashgen.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    TASKS,
    Relation,
    Request,
    realise,
    sample_request,
)

WORDS = sorted(
    {*SHAPES, *PLURALS.values(), *COLORS, *BACKGROUNDS, *NUMBERS.values(), "an", "and", "on", "background", "of", "to", "the", "one"}
    | {word for relation in RELATIONS for word in relation.split()}
)
TASK_SHARES = (0.1, 0.15, 0.2, 0.1, 0.25, 0.2)  # of the data set: one shape is learned long before two
SHAPE, COLOR, COUNT = (None, *SHAPES), (None, *COLORS), (None, 1, 2, 3, 4)
FIELDS: tuple[tuple[str | int | None, ...], ...] = (SHAPE, COLOR, COUNT, (None, *RELATIONS), (None, *BACKGROUNDS))
PHRASES = tuple((shape, color) for shape in SHAPES for color in COLOR)
INVERSE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def meaning(request: Request, length: int) -> list[list[int]]:
    """Meaning of each of a caption's first `length` tokens, as one class index per field of `FIELDS`; [length, fields].

    A word of a group tells its own group's shape, colour, count and place (the relation as seen from this group), so that
    image tokens bind by attending to one group's words. Every token tells the background.
    """
    places = (request.relation, INVERSE[request.relation]) if request.relation else (None, None)
    nothing: tuple[str | int | None, ...] = (None, None, None, None)
    said: list[tuple[str | int | None, ...]] = []
    for group, place in zip(request.groups, places, strict=False):
        if said:
            said += [nothing] * len((request.relation or "and").split())
        said += [(group.shape, group.color, group.count, place)] * len(group.words().split())
    said += [nothing] * (length - len(said))
    return [[values.index(value) for values, value in zip(FIELDS, (*fields, request.background), strict=True)] for fields in said[:length]]


def phrases(request: Request) -> list[float]:
    """Which (shape, colour) pairs a caption names, of `PHRASES`; in no order, without places."""
    named = {(group.shape, group.color) for group in request.groups}
    return [float(pair in named) for pair in PHRASES]


class ShapesData(TeacherData):
    """Captions and pictures drawn at random from the grammar."""

    words = WORDS
    field_sizes = tuple(len(values) for values in FIELDS)
    num_phrases = len(PHRASES)

    def draw(self, rng: np.random.Generator, count: int) -> list[Any]:
        return [sample_request(rng) for _ in range(count)]

    def caption(self, request: Any) -> str:
        return str(request.caption())

    def token_classes(self, request: Any, length: int) -> list[list[int]]:
        return meaning(request, length)

    def phrases(self, request: Any) -> list[float]:
        return phrases(request)

    def pictures(self, rng: np.random.Generator, count: int) -> Pictures:
        return np.stack([render(realise(sample_request(rng), rng, free=True)) for _ in range(count)])

    def captioned_pictures(self, rng: np.random.Generator, count: int) -> tuple[Pictures, list[str]]:
        requests = [sample_request(rng, task) for task in rng.choice(TASKS, count, p=TASK_SHARES)]
        return np.stack([render(realise(request, rng)) for request in requests]), [request.caption() for request in requests]
