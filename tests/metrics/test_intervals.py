"""Bootstrap intervals: coverage, clusters, pairs, tasks."""

from __future__ import annotations

import numpy as np
import pytest

from flashgen.errors import NumericsError
from flashgen.metrics.intervals import difference_intervals, intervals


def width(found: dict[str, tuple[float, float] | None], part: str = "overall") -> float:
    interval = found[part]
    assert interval is not None
    return interval[1] - interval[0]


def names(prompts: int, seeds: int) -> list[str]:
    return [f"prompt {i}" for i in range(prompts) for _ in range(seeds)]


@pytest.mark.parametrize("kind", ["normal", "passes", "skewed"])
def test_95_percent_intervals_hold_the_true_mean_in_93_to_97_percent_of_simulations(kind: str) -> None:
    rng, simulations, prompts, seeds = np.random.default_rng(0), 300, 32, 3
    held = 0
    for simulation in range(simulations):
        match kind:
            case "normal":
                truth, values = 0.0, rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, seeds))
            case "passes":
                truth, values = 0.75, (rng.random((prompts, seeds)) < rng.beta(3, 1, (prompts, 1))).astype(float)
            case _:
                truth, values = 1.0, rng.gamma(4, 0.25, (prompts, 1)) * rng.gamma(4, 0.25, (prompts, seeds))
        interval = intervals(values.ravel(), names(prompts, seeds), resamples=999, seed=simulation)["overall"]
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    assert 0.93 <= held / simulations <= 0.97


def test_pictures_of_one_prompt_do_not_count_as_independent() -> None:
    values = np.random.default_rng(1).normal(size=30)
    once, four = intervals(values, names(30, 1)), intervals(np.repeat(values, 4), names(30, 4))
    assert once == four
    assert width(intervals(np.repeat(values, 4), names(120, 1))) < 0.6 * width(four)


def test_paired_differences_are_narrow_where_two_artifacts_agree() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=40)
    b = a + 0.1 + 0.01 * rng.normal(size=40)
    found = difference_intervals(b, a, names(40, 1))
    interval = found["overall"]
    assert interval is not None and 0.09 < interval[0] < 0.1 < interval[1] < 0.11
    assert width(found) < 0.05 * width(intervals(a, names(40, 1)))


def test_tasks_have_intervals_of_their_own_and_weigh_the_same() -> None:
    values = [0.0] * 30 + [1.0] * 10
    tasks = ["counting"] * 30 + ["colors"] * 10
    found = intervals(values, names(40, 1), tasks)
    assert found == {"overall": (0.5, 0.5), "counting": (0.0, 0.0), "colors": (1.0, 1.0)}
    free = intervals(values, names(40, 1))
    assert set(free) == {"overall"} and free["overall"] is not None and free["overall"][1] < 0.5


def test_numbers_depend_on_the_seed_alone_and_never_leave_the_range_of_the_values() -> None:
    values: list[float] = np.random.default_rng(0).normal(size=10).tolist()
    assert intervals(values, names(10, 1), seed=3) == intervals(values, names(10, 1), seed=3) != intervals(values, names(10, 1), seed=4)
    values = [1.0] * 9 + [0.0]
    low, high = intervals(values, names(10, 1))["overall"] or (-1, 2)
    assert 0 <= low < 0.9 < high <= 1


def test_one_prompt_has_no_interval() -> None:
    assert intervals([1.0, 2.0], ["a", "a"]) == {"overall": None}
    assert intervals([1.0, 2.0, 3.0], ["a", "b", "c"], ["x", "x", "y"])["y"] is None
    assert intervals([], []) == {"overall": None}


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="a score is not finite"):
        intervals([1.0, float("nan")], ["a", "b"])
