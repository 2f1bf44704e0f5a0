"""The consensus on the sign, against the formula at each place."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.methods._consensus import agree

ELECT, DRAW, DIVIDE = ("weighted", "sum", "count"), ("zero", "positive"), ("weights", "count", "none")


def sgn(number: float) -> int:
    return (number > 0) - (number < 0)


def at_one_place(deltas: Sequence[float], weights: Sequence[float], elect: str, draw: str, divide: str) -> float:
    """The formula, with Python's numbers."""
    factors = weights if elect == "weighted" else [1] * len(deltas)
    votes = [sgn(delta) if elect == "count" else delta for delta in deltas]
    elected = sgn(sum(factor * vote for factor, vote in zip(factors, votes, strict=True)))
    if elected == 0 and draw == "positive":
        elected = 1
    inside = [
        (weight, delta)
        for weight, delta, factor in zip(weights, deltas, factors, strict=True)
        if sgn(factor) * sgn(delta) == elected != 0
    ]
    divisor = {"weights": sum(abs(weight) for weight, _ in inside), "count": len(inside), "none": 1}[divide]
    return sum(weight * delta for weight, delta in inside) / divisor if divisor else 0.0


NUMBERS = st.integers(-8, 8).map(lambda number: number / 4)  # sums of products are exact


@pytest.mark.parametrize(("elect", "draw", "divide"), itertools.product(ELECT, DRAW, DIVIDE))
@given(data=st.data(), inputs=st.integers(1, 4))
def test_every_convention_is_its_formula(elect, draw, divide, data, inputs):
    weights = data.draw(st.lists(NUMBERS, min_size=inputs, max_size=inputs))
    places = data.draw(st.lists(st.lists(NUMBERS, min_size=inputs, max_size=inputs), min_size=1, max_size=8))
    deltas = list(torch.tensor(places, dtype=torch.float64).T.contiguous())
    out = torch.full_like(deltas[0], torch.nan)
    agree(deltas, weights, out, elect, draw, divide)
    expected = [at_one_place(place, weights, elect, draw, divide) for place in places]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_weighted_mean_never_leaves_its_inputs():
    """As dividing by the sum of the weights does when negative ones are among them: here by 0.001."""
    out = torch.empty(1)
    agree([torch.tensor([1.0]), torch.tensor([-1.0])], [1.0, -0.999], out, "weighted", "zero", "weights")
    assert out.item() == pytest.approx(1.0)
