import math

import pytest
import torch

from merge.methods.model_stock import ModelStock
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import at_angle, frame, relative, tensors


@pytest.mark.parametrize("theta", [1e-6, 1e-2, 0.5, 1.5])
def test_of_two_it_is_the_mean_times_t(theta):
    a, b = at_angle(theta)
    t = 2 * math.cos(theta) / (1 + math.cos(theta))
    assert relative(apply(ModelStock(), a, 3 * b, dtype=torch.float64), t * (a + 3 * b) / 2) < 1e-13


def test_it_is_the_point_nearest_to_the_common_centre_that_the_cosine_tells_of():
    center, *noise = frame(6)
    given = [2 * center + 0.7 * side for side in noise]
    mean = sum(given) / 5
    nearest = mean * (mean @ (2 * center)) / (mean @ mean)
    assert relative(apply(ModelStock(), *given, dtype=torch.float64), nearest) < 1e-13


def test_orthogonal_and_opposite_differences_give_nothing():
    a, b = frame(2)
    assert apply(ModelStock(), a, b, dtype=torch.float64).norm() < 1e-15
    assert not apply(ModelStock(), a, -b - 0.1 * a).any()
    assert not apply(ModelStock(), a, -a).any()
    assert not apply(ModelStock(), torch.zeros(5), torch.zeros(5)).any()
    assert not apply(ModelStock(), torch.tensor(1.0), torch.tensor(-2.0)).any()


def test_a_zero_difference_is_orthogonal_to_all():
    a = frame(1)[0]
    cosine = 1 / 3  # of three pairs, one agrees
    t = 3 * cosine / (1 + 2 * cosine)
    assert relative(apply(ModelStock(), a, torch.zeros_like(a), a, dtype=torch.float64), t * 2 * a / 3) < 1e-14


def test_the_cosine_is_the_mean_of_pairs_or_of_neighbours():
    x, y, z = frame(3)
    given = [x, x + y, z]
    for cosine, name in (((math.sqrt(0.5) + 0 + 0) / 3, "pairs"), ((math.sqrt(0.5) + 0) / 2, "neighbours")):
        t = 3 * cosine / (1 + 2 * cosine)
        result = apply(ModelStock(cosine=name), *given, dtype=torch.float64)
        assert relative(result, t * sum(given) / 3) < 1e-13


@pytest.mark.parametrize("shape", [(6, 50), (6, 5, 3, 3)])
def test_by_rows_each_filter_has_its_t(shape):
    common, *noise = tensors(*shape, count=4)
    given = [common + scale for scale in noise]
    result = apply(ModelStock(per="rows"), *given, dtype=torch.float64)
    for row in range(6):
        expected = apply(ModelStock(), *(tensor[row] for tensor in given), dtype=torch.float64)
        assert relative(result[row], expected) < 1e-13


@pytest.mark.parametrize("per", ["tensor", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4, 1, 1), (0, 3)])
def test_equal_differences_are_left_bit_for_bit(per, dtype, shape):
    a = tensors(*shape, count=1, dtype=dtype)[0]
    assert same_bits(apply(ModelStock(per=per), a, a.clone(), a.clone(), dtype=dtype), a)


def test_the_order_does_not_matter_but_for_rounding():
    a, b, c = tensors(500, count=3)
    given = (a, a + b, a + c)
    there = apply(ModelStock(), *given, dtype=torch.float64)
    assert relative(apply(ModelStock(), *reversed(given), dtype=torch.float64), there) < 1e-14


@pytest.mark.parametrize("per", ["tensor", "rows"])
def test_runs_do_not_matter(per):
    a, b = tensors(7, 100, count=2, dtype=torch.float32)
    method = ModelStock(per=per)
    assert same_bits(apply(method, a, a + b), apply(method, a, a + b, runs=[1, 150, 0, 249, 300]))


@pytest.mark.parametrize("per", ["tensor", "rows"])
def test_mergekit_agrees_where_cosines_are_positive(per):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    common, *noise = tensors(6, 50, count=4)
    given = [common + 0.5 * scale for scale in noise]
    parameters = {"filter_wise": per == "rows"}
    peer = mergekit.merge_tensors([0 * common, *given], "model_stock", parameters=parameters, base_index=0)
    assert relative(apply(ModelStock(per=per), *given, dtype=torch.float64), peer) < 1e-12


def test_sd_mecha_takes_neighbours_and_rows():
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
    common, *noise = tensors(6, 50, count=4)
    given = [common + 0.5 * scale for scale in noise]
    peer = module.model_stock.__wrapped__(*given)
    method = ModelStock(per="rows", cosine="neighbours")
    assert relative(apply(method, *given, dtype=torch.float64), peer) < 1e-12
