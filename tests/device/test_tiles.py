from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from flashgen.device.tiles import decode_tiled, starts
from flashgen.pixels import Floats


def upscale(z: Floats) -> Floats:
    """A decoder without context: each latent becomes 4 x 4 pixels of its own."""
    return np.kron(z[:, :3], np.ones((4, 4), np.float32))


@pytest.mark.parametrize(("height", "width", "tile"), [(8, 8, 8), (9, 8, 8), (16, 24, 8), (21, 5, 8), (7, 30, 4), (6, 6, 2)])
def test_tiles_of_a_decoder_without_context_are_the_whole(height: int, width: int, tile: int) -> None:
    z = np.random.default_rng(0).standard_normal((2, 16, height, width)).astype(np.float32)
    seen = []

    def decode(part: Floats) -> Floats:
        seen.append(part.shape[2:])
        return upscale(part)

    np.testing.assert_allclose(decode_tiled(decode, z, tile, 4), upscale(z), atol=1e-6)
    assert max(max(shape) for shape in seen) <= tile


@pytest.mark.parametrize("length", range(1, 60))
def test_neighbours_overlap_and_the_last_tile_ends_at_the_end(length: int) -> None:
    found = starts(length, 8, 2)
    assert found[0] == 0 and found[-1] == max(0, length - 8)
    assert all(0 < b - a <= 6 for a, b in pairwise(found))


def test_a_difference_between_tiles_is_blended_linearly() -> None:
    calls = iter([0.0, 1.0])
    out = decode_tiled(lambda part: np.full((1, 3, 8, 8), next(calls), np.float32), np.zeros((1, 16, 8, 14), np.float32), 8, 1)
    np.testing.assert_allclose(out[0, 0, 0], [0] * 6 + [0.25, 0.75] + [1] * 6, atol=1e-6)
