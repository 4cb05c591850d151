from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flashgen.worlds.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    NUMBERS,
    RADIUS,
    RELATIONS,
    SHAPES,
    SIZE_PX,
    TASKS,
    Group,
    Request,
    Task,
    mutate,
    parse,
    prompt_set,
    realise,
    related,
    sample_request,
)


@pytest.mark.parametrize("task", TASKS)
def test_parse_reads_back_every_caption(task: Task) -> None:
    rng = np.random.default_rng(0)
    requests = [sample_request(rng, task) for _ in range(200)]
    assert [parse(r.caption()) for r in requests] == requests  # the task is derived, it is not in the caption
    assert {r.task for r in requests} == {task}
    assert {r.background for r in requests} == {None, *BACKGROUNDS}
    assert {g.shape for r in requests for g in r.groups} == set(SHAPES)


def test_sampled_requests_have_the_form_of_their_task() -> None:
    by_task = {t: [r for r in prompt_set(0, 100) if r.task == t] for t in TASKS}
    form = {t: {(len(r.groups), max(g.count for g in r.groups) > 1, bool(r.relation)) for r in rs} for t, rs in by_task.items()}
    one, two = {(1, False, False)}, {(2, False, False)}
    assert form == {
        "single_object": one, "colors": one, "two_object": two, "color_attr": two,
        "counting": {(1, True, False)}, "position": {(2, False, True)},
    }  # fmt: skip
    colored = {t: {g.color is not None for r in rs for g in r.groups} for t, rs in by_task.items()}
    assert colored["colors"] == colored["color_attr"] == {True} and colored["single_object"] == colored["two_object"] == {False}
    assert colored["counting"] == colored["position"] == {True, False}
    assert {g.count for r in by_task["counting"] for g in r.groups} == {2, 3, 4}
    assert {r.relation for r in by_task["position"]} == set(RELATIONS)
    assert all(len({g.color for g in r.groups}) == 2 for r in by_task["color_attr"])


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("  A Red  circle, on a WHITE background. ", "a red circle on a white background"),
        ("one circle to the left of one square", "a circle left of a square"),
        ("a circle to the right of a square on a gray background", "a circle right of a square on a gray background"),
        ("two red circles on a white", "two red circles on a white background"),
        ("three circle", "three circles"),
        ("two circles and a square", "two circles and a square"),
    ],
)
def test_parse_forgives_writing(prompt: str, caption: str) -> None:
    assert parse(prompt).caption() == caption


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("", "''"),
        ("a dog", "a dog"),
        ("circle", "circle"),
        ("five circles", "five circles"),
        ("a pink circle", "pink"),
        ("a big red circle", "a big red circle"),
        ("a circle on a pink background", "pink"),
        ("a circle and a square and a cross", "more than two"),
        ("a circle and a square above a cross", "a circle and a square"),
        ("a circle left of", "a circle left of"),
    ],
)
def test_parse_names_what_it_cannot_read(prompt: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        parse(prompt)


def test_mutate_changes_exactly_one_stated_attribute() -> None:
    rng = np.random.default_rng(1)
    changed: Counter[str] = Counter()
    for request in prompt_set(2, 50):
        before, after = _attributes(request), _attributes(mutate(request, rng))
        different = [name for name in before if before[name] != after[name]]
        assert before.keys() == after.keys() and len(different) == 1
        assert before[different[0]] is not None and after[different[0]] is not None  # stated before and after
        changed[different[0].split()[0]] += 1
    assert set(changed) == {"shape", "count", "color", "relation", "background"} and min(changed.values()) >= 10


def _attributes(request: Request) -> dict[str, object]:
    groups = {f"{key} {i}": getattr(g, key) for i, g in enumerate(request.groups) for key in ("shape", "count", "color")}
    return {**groups, "relation": request.relation, "background": request.background}


def test_prompt_set_is_a_function_of_the_seed_in_task_order() -> None:
    first = prompt_set(7, 5)
    assert first == prompt_set(7, 5) != prompt_set(8, 5)
    assert [r.task for r in first] == [t for t in TASKS for _ in range(5)]
    assert all(r.background is None for r in prompt_set(7, 5, background_prob=0.0))
    assert all(r.background for r in prompt_set(7, 5, background_prob=1.0))


@pytest.mark.parametrize("free", [False, True], ids=["lattice", "free"])
def test_realised_scenes_keep_the_prompt_and_the_drawing_rules(free: bool) -> None:
    rng = np.random.default_rng(2)
    for request in prompt_set(3, 40):
        scene = realise(request, rng, free=free)
        wanted = [(g.shape, g.color) for g in request.groups for _ in range(g.count)]
        assert [(i.shape, c and i.color) for i, (_, c) in zip(scene.items, wanted, strict=True)] == wanted
        assert scene.background == (request.background or scene.background) and scene.background in BACKGROUNDS
        assert all(i.color in COLORS for i in scene.items)
        for item in scene.items:
            assert all(item.radius + 2 / SIZE_PX <= c <= 1 - item.radius - 2 / SIZE_PX for c in (item.x, item.y))
            if not free:
                places = {1, 2, 3} if len(scene.items) == 1 else {1, 3}  # two and more have a quadrant each
                assert item.radius == RADIUS and {item.x * LATTICE, item.y * LATTICE} <= places
        if request.relation:
            a, b = (np.array([i.x, i.y]) for i in scene.items)
            assert related(a, b, request.relation, dominance=1.49)  # drawn unmistakably


def test_five_shapes_find_no_room() -> None:
    with pytest.raises(ValueError, match="room for four"):
        realise(parse("four circles and a square"), np.random.default_rng(0))


def test_realise_repeats_with_the_same_random_stream() -> None:
    request = Request("counting", (Group(4, None, "cross"),))
    assert len(NUMBERS) == 4
    assert realise(request, np.random.default_rng(4)) == realise(request, np.random.default_rng(4))
    assert realise(request, np.random.default_rng(4)) != realise(request, np.random.default_rng(5))
