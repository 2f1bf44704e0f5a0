"""Random numbers by position."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.methods._random import Uniform


def run(drawn: Uniform, start: int, count: int) -> torch.Tensor:
    out = torch.empty(count)
    drawn.run(start, out)
    return out


@given(start=st.integers(0, 300), count=st.integers(0, 300))
def test_any_run_can_be_had_alone(start, count):
    drawn = Uniform(7, "weight", 0)
    assert torch.equal(run(drawn, start, count), run(drawn, 0, 600)[start : start + count])


def test_runs_far_out_are_the_same_wherever_they_begin():
    drawn = Uniform(7, "weight", 0)
    far = 3 * 2**40
    assert torch.equal(run(drawn, far + 5, 40), run(drawn, far, 64)[5:45])


def test_the_numbers_never_change():
    """Masks of earlier merges can be made again, with any version of this project and of numpy, on any machine."""
    found = (run(Uniform(0, "weight", 1), 0, 6).double() * 2**24).long().tolist()
    assert found == KNOWN


KNOWN = [15393478, 5152144, 14153844, 408054, 11314998, 16253170]


def test_they_are_uniform_and_below_one():
    values = run(Uniform(1, "weight", 0), 0, 1 << 18).double()
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 64, 0, 1)
    expected = values.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi squared


@pytest.mark.parametrize("lag", [1, 2, 8, 1 << 12])
def test_neighbours_are_independent(lag):
    values = run(Uniform(1, "weight", 0), 0, 1 << 16).double()
    assert abs(torch.corrcoef(torch.stack([values[:-lag], values[lag:]]))[0, 1]) < 5 / 256


def test_seeds_names_and_inputs_have_nothing_in_common():
    others = [Uniform(*which) for which in itertools.product((0, 1, -1), ("weight", "weight2", "w"), (0, 1, 12))]
    values = torch.stack([run(other, 0, 1 << 14).double() for other in others])
    correlations = torch.corrcoef(values).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 128
