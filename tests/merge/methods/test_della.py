"""DELLA, with the election and without."""

import pytest
import torch

from merge.methods.dare_linear import DareLinear
from merge.methods.dare_ties import DareTies
from merge.methods.della import Della
from merge.methods.della_linear import DellaLinear
from tests.merge import memory
from tests.merge.memory import apply, same_bits
from tests.merge.methods.sparse import added_up, consensus
from tests.merge.methods.tensors import CASES, random

RANKS = pytest.mark.parametrize("ranks", ["row", "tensor"])


@RANKS
@pytest.mark.parametrize("name", CASES)
def test_without_a_window_it_is_dare_bit_for_bit(name, ranks):
    settings = {"density": 0.4, "seed": 3, "weights": (1.0, 0.5, 2.0)}
    tensors = CASES[name]
    for della, dare in ((Della, DareTies), (DellaLinear, DareLinear)):
        assert same_bits(apply(della(epsilon=0, ranks=ranks, **settings), *tensors), apply(dare(**settings), *tensors))


@RANKS
@pytest.mark.parametrize("name", CASES)
def test_both_put_together_what_is_left_of_each_input(name, ranks, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    tensors, weights = CASES[name], (1.0, 0.5, 2.0)
    settings = {"density": 0.5, "epsilon": 0.2, "ranks": ranks, "seed": 1}
    alone = [tuple(float(i == j) for i in range(3)) for j in range(3)]
    left = [apply(DellaLinear(weights=one, **settings), *tensors) for one in alone]
    found = apply(DellaLinear(weights=weights, scale=0.5, **settings), *tensors)
    torch.testing.assert_close(found.double(), 0.5 * added_up(left, weights), rtol=1e-6, atol=1e-8)
    found = apply(Della(weights=weights, scale=0.5, **settings), *tensors)
    torch.testing.assert_close(found.double(), 0.5 * consensus(left, weights), rtol=1e-6, atol=0)


@RANKS
def test_the_large_are_kept_more_often_and_the_density_is_the_mean(ranks):
    tensor = random(64, 1024, inputs=1)[0]
    together = (64, 1024) if ranks == "row" else (1, 64 * 1024)
    kept = (apply(DellaLinear(density=0.5, epsilon=0.3, ranks=ranks), tensor) != 0).double().reshape(together)
    for index, eighth in enumerate(tensor.reshape(together).abs().argsort(1).chunk(8, dim=1)):
        expected = 0.2 + 0.6 * (index + 0.5) / 8
        assert kept.gather(1, eighth).mean() == pytest.approx(expected, abs=5 * (0.25 / 2**13) ** 0.5)
    assert kept.mean() == pytest.approx(0.5, abs=5 * (0.25 / 2**16) ** 0.5)


def test_rows_and_the_tensor_rank_differently():
    """A small number that is large in its row is kept more often only if it is ranked there."""
    tensor = torch.cat([random(1, 4096, inputs=1)[0] * 1e-3, random(1, 4096, inputs=1, seed=1)[0]])
    by_row = apply(DellaLinear(density=0.5, epsilon=0.5, ranks="row"), tensor) != 0
    by_tensor = apply(DellaLinear(density=0.5, epsilon=0.5, ranks="tensor"), tensor) != 0
    assert by_row[0].double().mean() == pytest.approx(0.5, abs=0.04)
    assert by_tensor[0].double().mean() == pytest.approx(0.25, abs=0.04)


def test_the_papers_epsilon_is_the_whole_width_of_the_window():
    """There a number of rank r, from 0 for the largest, is dropped with p - epsilon / 2 + epsilon r / n."""
    p, epsilon, width = 0.6, 0.4, 1024
    tensor = random(64, width, inputs=1)[0]
    kept = (apply(DellaLinear(density=1 - p, epsilon=epsilon / 2), tensor) != 0).double()
    ranks = tensor.abs().argsort(1, descending=True)
    for index, eighth in enumerate(ranks.chunk(8, dim=1)):
        dropped = p - epsilon / 2 + epsilon * (index + 0.5) / 8
        assert kept.gather(1, eighth).mean() == pytest.approx(1 - dropped, abs=5 * (0.25 / 2**13) ** 0.5)


@RANKS
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (24, 1, 1, 1), (16, 1, 3, 3), (1,), ()])
def test_dimensions_of_one_do_no_harm(shape, ranks):
    """mergekit's ranks are 0/0 where the second dimension is 1."""
    tensors = random(*shape)
    for kind in (Della, DellaLinear):
        assert apply(kind(density=0.5, epsilon=0.4, ranks=ranks), *tensors).isfinite().all()


def test_a_window_that_reaches_beyond_is_cut_off():
    tensor = random(30, 40, inputs=1)[0]
    found = apply(DellaLinear(density=0.9, epsilon=0.5, ranks="tensor"), tensor)
    largest = tensor.abs() > tensor.abs().quantile(0.65)
    assert torch.equal(found[largest], tensor[largest]), "their probability is 1"


def test_mergekits_probabilities_are_these_on_matrices_and_undefined_where_the_second_dimension_is_one():
    mergekit = pytest.importorskip("mergekit.sparsify")
    tensor = random(40, 2000, inputs=1)[0]
    settings = {"density": 0.5, "epsilon": 0.3, "rescale": "none"}
    peer = torch.stack([mergekit.della_magprune(tensor, 0.5, 0.3) != 0 for _ in range(10)]).double().mean(0)
    ours = torch.stack([apply(DellaLinear(seed=seed, **settings), tensor) != 0 for seed in range(10)]).double().mean(0)
    for eighth in tensor.abs().argsort(1).chunk(8, dim=1):
        assert ours.gather(1, eighth).mean() == pytest.approx(peer.gather(1, eighth).mean().item(), abs=0.015)
    with pytest.raises(RuntimeError):
        mergekit.della_magprune(random(8, 1)[0], 0.5, 0.3)
    assert apply(DellaLinear(**settings), random(8, 1)[0]).isfinite().all()


@pytest.mark.parametrize("kind", [Della, DellaLinear])
def test_what_it_cannot_do_is_refused(kind):
    with pytest.raises(ValueError, match="density must be from 0 to 1"):
        kind(density=2.0)
    with pytest.raises(ValueError, match="epsilon must be from -1 to 1"):
        kind(epsilon=2.0)
