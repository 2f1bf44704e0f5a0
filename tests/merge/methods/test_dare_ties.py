import pytest
import torch

from merge.methods.dare_linear import DareLinear
from merge.methods.dare_ties import DareTies
from tests.merge import memory
from tests.merge.memory import apply
from tests.merge.methods.sparse import consensus
from tests.merge.methods.tensors import CASES, random


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_consensus_of_what_dare_linear_adds_up(name, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    tensors = CASES[name]
    alone = [tuple(float(i == j) for i in range(3)) for j in range(3)]
    left = [apply(DareLinear(density=0.4, seed=2, weights=one), *tensors) for one in alone]
    found = apply(DareTies(density=0.4, seed=2, weights=(1.0, 0.5, 2.0), scale=1.5), *tensors)
    torch.testing.assert_close(found.double(), 1.5 * consensus(left, (1.0, 0.5, 2.0)), rtol=1e-6, atol=0)


def test_an_input_that_was_dropped_neither_votes_nor_counts():
    one, two = torch.full((1000,), 3.0), torch.full((1000,), -1.0)
    found = apply(DareTies(density=0.5, rescale="none"), one, two)
    first, second = (
        apply(DareLinear(density=0.5, rescale="none", weights=weights), one, two) != 0
        for weights in ((1.0, 0.0), (0.0, 1.0))
    )
    assert (found[first] == 3).all()
    assert (found[second & ~first] == -1).all()
    assert (found[~first & ~second] == 0).all()


def test_with_everything_kept_it_is_the_consensus():
    tensors = random(7, 8)
    found = apply(DareTies(density=1), *tensors)
    torch.testing.assert_close(found.double(), consensus(tensors, (1, 1, 1)), rtol=1e-6, atol=0)
