import pytest
import torch

from merge.methods.add_difference import AddDifference
from merge.methods.similarity_add_difference import SimilarityAddDifference
from tests.merge.memory import apply
from tests.merge.methods.tensors import random


def formula(a, b, c, alpha, beta):
    threshold = torch.maximum(a.abs(), b.abs())
    similarity = beta * (a * b / threshold**2 + 1) / 2
    return (1 - similarity) * (a + alpha * (b - c)) + similarity * ((1 - alpha / 2) * a + alpha / 2 * b)


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_it_is_the_formula(alpha, beta):
    a, b, c = random(6, 50, dtype=torch.float64)
    result = apply(SimilarityAddDifference(alpha=alpha, beta=beta), a, b, c, dtype=torch.float64)
    torch.testing.assert_close(result, formula(a, b, c, alpha, beta), rtol=1e-11, atol=1e-17)


def test_equal_numbers_are_averaged_and_opposite_ones_have_their_difference_added():
    c = torch.tensor([0.5, 0.5, 0.5, 0.5])
    a, b = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 0.0, 1.0])
    result = apply(SimilarityAddDifference(alpha=1.0), a, b, c)
    similarity = [1.0, 0.0, 1.0, 0.5]  # two zeros are equal; a zero and a one are neither
    expected = [(1 - s) * (x + y - 0.5) + s * (x + y) / 2 for s, x, y in zip(similarity, a, b, strict=True)]
    assert result.tolist() == expected


def test_numbers_whose_squares_vanish_are_still_compared():
    a, b, c = torch.tensor([1e-30]), torch.tensor([-1e-30]), torch.tensor([0.0])
    assert apply(SimilarityAddDifference(alpha=0.5), a, b, c).item() == pytest.approx(0.5e-30)


def test_without_similarity_it_is_add_difference():
    tensors = random(6, 50, dtype=torch.float64)
    result = apply(SimilarityAddDifference(alpha=0.7, beta=0.0), *tensors, dtype=torch.float64)
    assert torch.equal(result, apply(AddDifference(weight=0.7), *tensors, dtype=torch.float64))


def test_similarity_counts_no_more_than_all():
    with pytest.raises(ValueError, match="beta"):
        SimilarityAddDifference(beta=1.5)
