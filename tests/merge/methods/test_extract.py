import pytest
import torch
from torch.nn.functional import cosine_similarity

from merge.methods.extract import Extract
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import relative, tensors


def directly(a, b, alpha, beta, gamma, cosine):
    d = ((cosine + 1) / 2) ** gamma
    return ((1 - alpha) * a + alpha * b) * ((1 - beta) * d + beta * (1 - d))


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(0.5, 0.0, 1.0), (0.3, 0.2, 3.0), (0.0, 1.0, 0.5), (0.4, 0.5, 0.0)]
)
@pytest.mark.parametrize("shape", [(6, 50), (6, 5, 3, 3), (50,)])
def test_rows_count_by_how_much_they_agree(alpha, beta, gamma, shape):
    a, b = tensors(*shape, count=2)
    b = b + 0.5 * a
    rows = [(tensor.flatten(1) if tensor.ndim > 1 else tensor[None]) for tensor in (a, b)]
    cosine = cosine_similarity(*rows, dim=1).reshape(-1, *[1] * (len(shape) - 1))
    result = apply(Extract(alpha=alpha, beta=beta, gamma=gamma), a, b, dtype=torch.float64)
    assert relative(result, directly(a, b, alpha, beta, gamma, cosine)) < 1e-13


@pytest.mark.parametrize("shape", [(6, 50), (6, 5, 3, 3), (50,)])
def test_by_the_last_dimension_it_is_supermergers(shape):
    a, b = tensors(*shape, count=2)
    cosine = cosine_similarity(a, b, dim=-1)[..., None]
    result = apply(Extract(alpha=0.3, beta=0.2, gamma=2.0, per="last"), a, b, dtype=torch.float64)
    assert relative(result, directly(a, b, 0.3, 0.2, 2.0, cosine)) < 1e-13


def test_what_is_the_same_is_kept_whole_or_left_out_whole():
    a = tensors(6, 50, count=1)[0]
    assert relative(apply(Extract(beta=0.0), a, a.clone(), dtype=torch.float64), a) < 1e-14
    assert apply(Extract(beta=1.0), a, a.clone(), dtype=torch.float64).norm() < 1e-14
    assert apply(Extract(beta=0.0), a, -a, dtype=torch.float64).norm() < 1e-14


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_a_row_that_is_zero_in_one_is_neither_alike_nor_not(gamma):
    a, b = tensors(6, 50, count=2)
    a[2], a[3], b[3] = 0, 0, 0
    result = apply(Extract(alpha=0.5, beta=0.0, gamma=gamma), a, b, dtype=torch.float64)
    assert relative(result[2], 0.5 * b[2] * 0.5**gamma) < 1e-14
    assert not result[3].any()


def test_the_two_inputs_are_alike_in_turn():
    a, b = tensors(6, 50, count=2)
    there = apply(Extract(alpha=0.3), a, b, dtype=torch.float64)
    assert relative(apply(Extract(alpha=0.7), b, a, dtype=torch.float64), there) < 1e-14


@pytest.mark.parametrize("per", ["rows", "last", "tensor"])
def test_runs_do_not_matter(per):
    a, b = tensors(7, 100, count=2, dtype=torch.float32)
    method = Extract(gamma=2.0, per=per)
    assert same_bits(apply(method, a, b), apply(method, a, b, runs=[1, 150, 0, 249, 300]))


@pytest.mark.parametrize("field", ["alpha", "beta", "gamma"])
def test_numbers_have_ranges(field):
    with pytest.raises(ValueError, match=field):
        Extract(**{field: -0.1})
