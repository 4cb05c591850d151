from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from flashgen.flow.grid import shifted_grid
from flashgen.flow.ode import euler, guide, second_order


def test_shifted_grid_is_the_one_of_method_1_2() -> None:
    assert shifted_grid(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert shifted_grid(2, 3.0) == pytest.approx([1.0, 0.75, 0.0])


def test_shifted_grid_contains_the_students_nodes_when_its_steps_are_a_multiple() -> None:
    fine = shifted_grid(28, 3.0)
    assert len(fine) == 29 and fine[-1] == 0
    assert [fine[i] for i in range(0, 29, 7)] == pytest.approx(shifted_grid(4, 3.0))


def test_euler_is_exact_on_straight_paths_and_passes_each_node() -> None:
    x0, eps = np.array([1.0, -2.0]), np.array([0.3, 0.7])
    seen: list[tuple[float, int]] = []

    def velocity(x: np.ndarray, sigma: float, index: int) -> np.ndarray:
        np.testing.assert_allclose(x, (1 - sigma) * x0 + sigma * eps)
        seen.append((sigma, index))
        return np.asarray(eps - x0)

    np.testing.assert_allclose(euler(eps, velocity, [1.0, 0.9, 0.5, 0.0]), x0)
    assert seen == [(1.0, 0), (0.9, 1), (0.5, 2)]


@pytest.mark.parametrize(("second", "halves_by"), [(False, 2), (True, 4)])
def test_a_second_order_step_costs_nothing_and_its_error_falls_by_four(second: bool, halves_by: int) -> None:
    """dx/dsigma = x from 1 to 0, which ends at exp(-1), on the shifted grid of a teacher."""

    def error(steps: int) -> float:
        x, before = 1.0, None
        for s, s_next in pairwise(shifted_grid(steps, 3.0)):
            moved = second_order(x, s_next - s, before) if second else x
            before, x = (x, s_next - s), x + (s_next - s) * moved
        return abs(x - math.exp(-1))

    assert error(64) / error(128) == pytest.approx(halves_by, rel=0.1)


def test_scales_are_of_the_state_and_of_the_velocity_step_by_step() -> None:
    found = euler(np.array([2.0]), lambda x, sigma, index: x + index, [1.0, 0.5, 0.0], [(0.5, 2.0), (3.0, 0.0)])
    first = 0.5 * 2 + 2 * -0.5 * 2
    np.testing.assert_allclose(found, 3 * first)


def test_guide_weighs_as_diffusers_does() -> None:
    u, c = np.array([1.0]), np.array([3.0])
    assert guide(u, c, 1.0) == 3.0
    assert guide(u, c, 4.0) == 9.0
