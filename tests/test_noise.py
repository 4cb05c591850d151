from __future__ import annotations

import numpy as np
import pytest

from flashgen.noise import latents, philox, randn


def test_randn_gives_torch_cudas_numbers_for_seed_0() -> None:
    want = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    np.testing.assert_allclose(randn((6,), 0), want, rtol=0, atol=3e-7 / 2)


def test_philox_matches_the_reference_vector_for_zero_counter_and_key() -> None:
    # Random123 kat_vectors: philox4x32 10, counter and key 0 -> 6627e8d5 e169c58d ...
    first, second = philox(np.zeros(1, np.uint64), 0)
    assert (int(first[0]), int(second[0])) == (0x6627E8D5, 0xE169C58D)


def test_randn_uses_all_64_bits_of_the_seed() -> None:
    assert not np.array_equal(randn((8,), 5), randn((8,), 5 + 2**32))


def test_randn_is_row_major_and_standard_normal() -> None:
    flat = randn((65536,), 7)
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(randn((16, 64, 64), 7).ravel(), flat)
    assert flat.mean() == pytest.approx(0, abs=0.02) and flat.std() == pytest.approx(1, abs=0.02)
    assert (flat**4).mean() == pytest.approx(3, abs=0.15)


def test_latents_of_a_picture_do_not_depend_on_the_batch() -> None:
    both = latents((16, 8, 8), [3, 4])
    np.testing.assert_array_equal(both[1], randn((16, 8, 8), 4))


def test_latents_of_a_picture_that_is_not_square_are_row_major() -> None:
    np.testing.assert_array_equal(latents((4, 6, 10), [3])[0].ravel(), randn((240,), 3))
