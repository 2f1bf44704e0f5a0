from itertools import permutations

import numpy as np
import pytest

from merge.assignment import assign


def total(gain, columns):
    return gain[np.arange(len(gain)), columns].sum()


@pytest.mark.parametrize("size", range(7))
@pytest.mark.parametrize("kind", ["any", "tied", "huge and tiny"])
def test_no_pairing_is_better(size, kind):
    rng = np.random.default_rng(size)
    for _ in range(10):
        gain = rng.normal(size=(size, size))
        if kind == "tied":
            gain = rng.integers(-1, 2, size=(size, size)).astype(float)
        elif kind == "huge and tiny":
            gain = gain * 10.0 ** rng.integers(-9, 9, size=(size, size))
        columns = assign(gain)
        assert sorted(columns) == list(range(size))
        best = max((total(gain, np.array(order, dtype=int)) for order in permutations(range(size))), default=0)
        assert total(gain, columns) == pytest.approx(best, rel=1e-12)


def test_a_shuffled_set_is_put_in_order_again():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 50))
    order = rng.permutation(200)
    shuffled = (vectors + 0.2 * rng.normal(size=vectors.shape))[order]
    assert np.array_equal(order[assign(vectors @ shuffled.T)], np.arange(200))


@pytest.mark.parametrize("size", [50, 200])
@pytest.mark.parametrize("kind", ["any", "tied"])
def test_scipy_finds_none_better(size, kind):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    gain = rng.normal(size=(size, size)) if kind == "any" else rng.integers(0, 3, size=(size, size)).astype(float)
    rows, columns = optimize.linear_sum_assignment(gain, maximize=True)
    assert total(gain, assign(gain)) == pytest.approx(gain[rows, columns].sum(), rel=1e-12)
