from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from flashgen.worlds.shapes.render import coverage, render, signed_distance
from flashgen.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, Item, Scene, prompt_set, realise

# Areas of the unit-size outlines. Triangle: equilateral, height 2.05, hence inradius 2.05 / 3 and area 3 sqrt(3) r^2.
AREA = {
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * math.sqrt(3) * (2.05 / 3) ** 2,
    "cross": 2 * (2.1 * 0.72) - 0.72**2,
}


@pytest.mark.parametrize("radius", [0.11, 0.17, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_of_the_shape(shape: str, radius: float) -> None:
    for x, y in ((0.5, 0.5), (0.503, 0.4917)):
        area = float(coverage(Item(shape, "red", x, y, radius)).sum()) / 64**2
        assert area == pytest.approx(AREA[shape] * radius**2, rel=0.02)
    assert AREA[shape] == pytest.approx(3, rel=0.27)  # similar for all, so that size does not give the shape away


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_antialiased_symmetric_and_placed(shape: str) -> None:
    alpha = coverage(Item(shape, "red", 0.5, 0.5, 0.213))
    assert alpha.min() == 0 and alpha.max() == 1 and alpha[32, 32] == 1
    partial = (alpha > 0) & (alpha < 1)
    assert partial.sum() >= 20 and not np.any(partial & ndimage.binary_erosion(alpha >= 0.5, iterations=2))  # an edge one pixel wide
    assert np.allclose(alpha, alpha[:, ::-1], atol=1e-5)
    upright = np.allclose(alpha, alpha[::-1], atol=1e-5)
    assert upright is (shape != "triangle")
    moved = coverage(Item(shape, "red", 0.5 + 5 / 64, 0.5 - 3 / 64, 0.213))
    assert np.allclose(np.roll(alpha, (-3, 5), (0, 1)), moved, atol=1e-4)


def test_triangle_points_up_and_is_equilateral() -> None:
    y, x = np.mgrid[-2:2:801j, -2:2:801j]
    rows, columns = np.nonzero(signed_distance("triangle", x, y) <= 1e-9)
    apex, base = y[rows.min(), 0], y[rows.max(), 0]
    assert (apex, base) == (pytest.approx(-1.3, abs=0.01), pytest.approx(0.75, abs=0.01))
    side = np.ptp(x[0, columns[rows == rows.max()]])
    assert side == pytest.approx((base - apex) * 2 / math.sqrt(3), abs=0.02) and np.ptp(columns[rows == rows.min()]) <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_is_a_lower_bound_of_the_true_distance(shape: str) -> None:
    """A step of length d changes it by at most d, so that an anti-aliased edge is never thicker than a pixel."""
    y, x = np.mgrid[-2:2:201j, -2:2:201j]
    distance = signed_distance(shape, x, y)
    assert max(abs(np.diff(distance, axis=a)).max() for a in (0, 1)) <= 0.02 + 1e-9
    assert distance[100, 100] < 0 < distance[0, 0]


def test_signed_distance_refuses_unknown_shapes() -> None:
    with pytest.raises(ValueError, match="blob"):
        signed_distance("blob", np.zeros(1), np.zeros(1))


def test_render_paints_palette_colours_exactly() -> None:
    image = render(Scene((Item("square", "cyan", 0.5, 0.5, 0.2),), "gray"))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[32, 32]) == COLORS["cyan"] and tuple(image[0, 0]) == BACKGROUNDS["gray"]
    assert render(Scene((), "black"), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("free", [False, True], ids=["lattice", "free"])
def test_render_keeps_shapes_apart_and_the_border_free(free: bool) -> None:
    rng = np.random.default_rng(11)
    for request in prompt_set(5, 25):
        masks = [coverage(item) > 0 for item in realise(request, rng, free=free).items]
        for index, mask in enumerate(masks):
            edge = sum(int(side.sum()) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
            assert edge <= (12 if free else 0)  # a free triangle's tip may be cut by 3 px
            rest = np.logical_or.reduce([np.zeros_like(mask), *masks[:index], *masks[index + 1 :]])
            gap = ndimage.distance_transform_edt(~rest)[mask].min() if rest.any() else math.inf
            assert gap >= 2  # a row of background at least, so that shapes do not merge
