from __future__ import annotations

import math

import numpy as np
import pytest

from data_tools.sampling.permutation import KeyedPermutation
from tests.refusals import assert_refused


@pytest.mark.parametrize("size", [*range(1, 130), 1000, 4095, 4096, 4097, 65_536, 99_991])
def test_permutation_is_a_bijection(size: int) -> None:
    places = KeyedPermutation(size, key=(7, 0, "a"))(np.arange(size))
    assert np.array_equal(np.sort(places), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 100, 10**9 + 7, 2**40 + 1, 2**62])
def test_vectorised_permutation_equals_the_scalar_one(size: int) -> None:
    permutation = KeyedPermutation(size, key=(3, 5))
    indices = np.unique(np.linspace(0, size - 1, 50).astype(np.int64).clip(0, size - 1))
    expected = [permutation.permute_one(index) for index in indices.tolist()]
    assert permutation(indices).tolist() == expected
    assert all(0 <= place < size for place in expected)


def test_every_position_is_equally_likely_over_keys() -> None:
    size, num_keys = 7, 7000
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), KeyedPermutation(size, key=(key,))(np.arange(size))] += 1
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbours_are_scattered_over_the_whole_range() -> None:
    size = 100_000
    places = KeyedPermutation(size, key=(0,))(np.arange(size))
    steps = np.abs(np.diff(places))
    assert steps.mean() == pytest.approx(size / 3, rel=0.02)  # of two independent uniform places
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.02


def test_seed_epoch_and_name_each_give_another_order() -> None:
    orders = {
        KeyedPermutation(1000, key=key)(np.arange(1000)).tobytes()
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    }
    assert len(orders) == 4


def test_order_is_the_same_in_every_process_and_version() -> None:
    assert KeyedPermutation(10, key=(1, 2, "name"))(np.arange(10)).tolist() == [
        2,
        6,
        0,
        1,
        8,
        9,
        3,
        7,
        4,
        5,
    ]


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_permutation_size_out_of_range_is_refused(size: int) -> None:
    with assert_refused("size", value=size, constraint=("between 1", "2**62"), remedy="samples"):
        KeyedPermutation(size, key=(0,))
