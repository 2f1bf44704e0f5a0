"""Ranges, weights and parts."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from merge.coefficients import Varying
from merge.methods._numbers import check_range, one_each, part, window
from tuner.errors import ConfigError


@given(percent=st.integers(0, 100), count=st.integers(0, 100_000_000))
@example(percent=29, count=100)
@example(percent=57, count=100_000_000)
def test_a_part_is_rounded_down_as_in_decimals(percent, count):
    assert part(percent / 100, count) == int(Fraction(percent, 100) * count)


@given(width=st.integers(0, 20), offset=st.integers(0, 20), count=st.integers(0, 50))
def test_a_window_holds_its_share_and_goes_round(width, offset, count):
    ranges = window(width / 20, offset / 20, count)
    held = [index for begin, end in ranges for index in range(begin, end)]
    assert len(held) == len(set(held))
    assert all(0 <= index < count for index in held)
    begin = int(Fraction(offset, 20) * count)
    end = int(Fraction(offset + width, 20) * count)
    assert held == [index % count for index in range(begin, end)]


@pytest.mark.parametrize(
    "number", [-0.1, 1.1, Varying(default=0.5, blocks={"IN04": 2.0}), Varying(names=(("*", -1.0),))]
)
def test_a_number_out_of_range_is_refused_wherever_it_stands(number):
    with pytest.raises(ValueError, match="density must be from 0 to 1, got"):
        check_range("density", number)


def test_numbers_at_the_ends_of_the_range_are_taken():
    for number in (0, 1, 0.0, 1.0, Varying(default=0.0, blocks={"IN04": 1.0}), Varying(preset="GRAD_V")):
        check_range("density", number)


def test_weights_are_one_each_or_none():
    assert one_each((), 3) == [1, 1, 1]
    assert one_each((2, 0.5), 2) == [2, 0.5]
    with pytest.raises(ConfigError, match="weights: 2 of them for 3 inputs"):
        one_each((2, 0.5), 3)
