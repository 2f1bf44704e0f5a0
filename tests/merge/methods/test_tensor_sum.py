from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.methods.tensor_sum import TensorSum
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import CASES, random


@given(width=st.integers(0, 20), offset=st.integers(0, 20), rows=st.integers(1, 30), data=st.data())
def test_rows_of_the_window_are_the_second_models(width, offset, rows, data):
    a, b = random(rows, 3, inputs=2)
    begin, end = int(Fraction(offset, 20) * rows), int(Fraction(offset + width, 20) * rows)
    expected = a.clone()
    for row in range(begin, end):
        expected[row % rows] = b[row % rows]
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * 3), max_size=4)))
    runs = [y - x for x, y in zip([0, *cuts], [*cuts, rows * 3], strict=True)]
    assert same_bits(apply(TensorSum(width=width / 20, offset=offset / 20), a, b, runs=runs), expected)


@pytest.mark.parametrize("name", CASES)
def test_at_the_ends_it_is_one_model(name):
    a, b = CASES[name][:2]
    for offset in (0.0, 0.3, 1.0):
        assert same_bits(apply(TensorSum(width=0, offset=offset), a, b), a)
        assert same_bits(apply(TensorSum(width=1, offset=offset), a, b), b)
    assert TensorSum(width=0).unchanged() == 0
    assert TensorSum(width=1).unchanged() == 1
    assert TensorSum(width=0.5).unchanged() is None


def test_bounds_are_rounded_down():
    """As in supermerger; to the nearest, as in sd-mecha, this would be two rows from the second on."""
    a, b = torch.zeros(4), torch.ones(4)
    assert apply(TensorSum(width=0.4, offset=0.4), a, b).tolist() == [0, 1, 1, 0]
    assert apply(TensorSum(width=0.4, offset=0.2), a, b).tolist() == [1, 1, 0, 0]


def test_a_scalar_is_one_row():
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert apply(TensorSum(width=0.9), a, b).item() == 1
    assert apply(TensorSum(width=1.0), a, b).item() == 2


def test_sd_mecha_rounds_to_the_nearest_row_and_writes_into_its_inputs():
    mecha = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.slicing")
    for width, offset in ((0.4, 0.2), (0.5, 0.7), (1.0, 0.3)):
        a, b = random(10, 3, inputs=2)
        peer = mecha.tensor_sum.__wrapped__(a.clone(), b.clone(), width, offset)
        assert torch.equal(apply(TensorSum(width=width, offset=offset), a, b), peer), "whole rows: nothing to round"
    a, b = torch.zeros(4), torch.ones(4)
    assert mecha.tensor_sum.__wrapped__(a, b, 0.4, 0.4).tolist() == [0, 0, 1, 0]
    assert a.tolist() == [0, 0, 1, 0]


def test_what_it_cannot_do_is_refused():
    for field in ("width", "offset"):
        with pytest.raises(ValueError, match=f"{field} must be from 0 to 1"):
            TensorSum(**{field: -0.1})
