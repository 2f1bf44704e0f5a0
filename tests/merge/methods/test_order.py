"""Sums whose order decides the last digits are added up in an order of our own: torch's is as wide as the processor."""

import pytest
import torch
from torch import Tensor

from merge.methods._totals import summed, total
from tests.merge.memory import apply
from tests.merge.methods.test_laws import METHODS, example, inputs, variations

OWN = {
    "arcee_fusion": "a softmax of each row, whose exponentials are not the same everywhere either",
    "rotate": "a singular value decomposition of LAPACK's",
}
"""Methods whose last digits the processor may decide, and by what."""
SUMS = ("sum", "mean", "norm", "dot", "mm", "matmul", "std", "var", "cumsum", "prod", "__matmul__")


@pytest.fixture
def no_wide_sums(monkeypatch):
    """Torch's own sums of floating-point numbers fail."""

    def guarded(own):
        def call(first, *others, **more):
            assert not isinstance(first, Tensor) or not first.is_floating_point(), "a sum whose order is torch's"
            return own(first, *others, **more)

        return call

    for place in (torch, Tensor):
        for name in SUMS:
            if hasattr(place, name):
                monkeypatch.setattr(place, name, guarded(getattr(place, name)))


@pytest.mark.parametrize("name", METHODS.names())
def test_no_method_leaves_the_order_of_its_sums_to_the_processor(name, no_wide_sums):
    tensors = inputs(name)
    methods = [example(name), *(varied for _, _, varied in variations(name))]

    def work() -> None:
        for method in methods:
            apply(method, *tensors)

    if name in OWN:
        with pytest.raises(AssertionError, match="a sum whose order is torch's"):
            work()
    else:
        work()


def test_a_total_is_that_of_halves_whatever_the_number_of_terms():
    for count in (0, 1, 2, 3, 7, 1000, 1001):
        numbers = torch.randn(count, generator=torch.Generator().manual_seed(count))
        terms = [float(number) ** 2 for number in numbers.double()]
        while len(terms) > 1:
            half = (len(terms) + 1) // 2
            terms = [a + b for a, b in zip(terms[:half], [*terms[half:], 0.0], strict=False)]
        assert total(numbers, squared=True) == summed(numbers.double().square()) == (terms[0] if terms else 0.0)
