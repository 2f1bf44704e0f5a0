import pytest
import torch
from torch import Tensor

from merge.lora.decomposition import decompose, decompose_product


def spectrum(out: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left * values @ right.T


SLOW = 1.0 / torch.arange(1, 201, dtype=torch.float64)
FAST = 0.9 ** torch.arange(200, dtype=torch.float64)
FLAT = torch.linspace(1, 0.9, 200, dtype=torch.float64)


@pytest.mark.parametrize("values", [SLOW, FAST, FLAT], ids=["slow", "fast", "flat"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
@pytest.mark.parametrize("most", [1, 8, 32, None])
def test_the_error_that_is_said_is_the_error_that_there_is(
    values: Tensor, shape: tuple[int, int], most: int | None
) -> None:
    matrix = spectrum(*shape, values)
    found = decompose(matrix, most)
    for rank in {1, min(8, most or 8), most or 200}:
        dense = found.low_rank(rank, shape).dense()
        error = ((matrix - dense).norm() / matrix.norm()).item()
        assert found.error(rank) == pytest.approx(error, rel=1e-5, abs=1e-6)
        best = (values[rank:].norm() / values.norm()).item()
        assert best - 1e-7 <= error <= 1.01 * best + 1e-6


@pytest.mark.parametrize("most", [8, None])
def test_singular_values_are_those_of_the_matrix(most: int | None) -> None:
    matrix = spectrum(200, 300, FAST)
    found = decompose(matrix, most)
    assert torch.allclose(found.values[:8], FAST[:8], rtol=1e-6)
    assert found.total == pytest.approx(matrix.square().sum().item(), rel=1e-12)
    for basis in (found.left.T, found.right):
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-12)


def test_a_matrix_of_low_rank_is_found_to_the_last_digit() -> None:
    matrix = spectrum(200, 300, FAST[:5])
    found = decompose(matrix, 8)
    assert found.error(5) < 2e-8
    assert torch.allclose(found.low_rank(5, (200, 300)).dense(), matrix, atol=1e-6)


def test_the_same_matrix_is_decomposed_into_the_same_bits() -> None:
    matrix = spectrum(200, 300, SLOW)
    one, same, other = (decompose(matrix, 8, seed, "name") for seed in (0, 0, 1))
    assert torch.equal(one.left, same.left) and torch.equal(one.right, same.right)
    assert not torch.equal(one.left, other.left)
    assert torch.allclose(one.low_rank(4, (200, 300)).dense(), other.low_rank(4, (200, 300)).dense(), atol=1e-3)


@pytest.mark.parametrize(
    ("out", "columns", "inner"), [(40, 60, 5), (60, 40, 40), (40, 60, 50), (3, 60, 5), (40, 60, 1)]
)
def test_a_product_is_decomposed_without_being_formed(out: int, columns: int, inner: int) -> None:
    left = torch.randn(out, inner, dtype=torch.float64)
    right = torch.randn(inner, columns, dtype=torch.float64)
    found = decompose_product(left, right)
    expected = torch.linalg.svdvals(left @ right)
    assert torch.allclose(found.values, expected[: len(found.values)], atol=1e-10)
    assert found.rest == 0
    rank = min(inner, out, columns)
    assert torch.allclose(found.left * found.values @ found.right, left @ right, atol=1e-10)
    assert found.error(rank) < 1e-12
    if rank > 2:
        assert found.error(2) == pytest.approx((expected[2:].norm() / expected.norm()).item(), rel=1e-9)


def test_signs_do_not_depend_on_chance() -> None:
    left, right = torch.randn(40, 4, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    one = decompose_product(left, right).low_rank(4, (40, 30))
    other = decompose_product(left @ turned, turned.T @ right).low_rank(4, (40, 30))
    assert torch.allclose(one.product.left, other.product.left, atol=1e-5)
    assert torch.allclose(one.product.right, other.product.right, atol=1e-5)
    assert one.product.left.norm() == pytest.approx(one.product.right.norm().item())


def test_a_matrix_of_zeros_has_no_error() -> None:
    found = decompose(torch.zeros(200, 300), 4)
    assert found.error(0) == found.error(4) == 0.0
    assert not found.low_rank(4, (200, 300)).dense().any()
