"""Breadcrumbs, with the election and without."""

import pytest
import torch

from merge.methods.breadcrumbs import Breadcrumbs
from merge.methods.breadcrumbs_ties import BreadcrumbsTies
from merge.methods.magnitude import Magnitude
from merge.methods.ties import Ties
from tests.merge import memory
from tests.merge.memory import apply, same_bits
from tests.merge.methods.sparse import added_up, consensus, trimmed
from tests.merge.methods.tensors import CASES, random


@pytest.mark.parametrize("name", CASES)
def test_both_put_together_what_lies_in_the_middle(name, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    tensors, weights = CASES[name], (1.0, 0.5, 2.0)
    for density, gamma in ((0.5, 0.25), (0.75, 0.5), (0.25, 0.01)):
        left = [trimmed(tensor, density, gamma) for tensor in tensors]
        settings = {"density": density, "gamma": gamma, "weights": weights, "scale": 0.5}
        found = apply(Breadcrumbs(**settings), *tensors, dtype=torch.float64)
        torch.testing.assert_close(found, 0.5 * added_up(left, weights), rtol=1e-14, atol=1e-18)
        found = apply(BreadcrumbsTies(**settings), *tensors, dtype=torch.float64)
        torch.testing.assert_close(found, 0.5 * consensus(left, weights), rtol=1e-14, atol=0)


@pytest.mark.parametrize("elements", [1, 2, 3, 10, 64, 99, 100, 101, 1000])
def test_small_tensors_keep_their_part(elements):
    """mergekit before 0.1.5 dropped all of a tensor with fewer than 1 / gamma numbers."""
    tensor = random(elements, inputs=1)[0]
    found = apply(Breadcrumbs(density=0.9, gamma=0.01), tensor)
    assert (found != 0).sum() == max(1, int(0.9 * elements))
    assert (found.abs().max() < tensor.abs().max()) == (elements >= 100)


def test_without_gamma_it_trims():
    tensors = random(30, 20)
    assert same_bits(apply(Breadcrumbs(density=0.3, gamma=0), *tensors), apply(Magnitude(density=0.3), *tensors))
    assert same_bits(apply(BreadcrumbsTies(density=0.3, gamma=0), *tensors), apply(Ties(density=0.3), *tensors))


def test_mergekit_agrees_where_there_is_one_number_to_keep():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    tensors, weights = random(20, 30), [1.0, 0.5, 2.0]
    base = torch.zeros_like(tensors[0])
    for density, gamma in ((0.5, 0.1), (0.9, 0.01), (0.75, 0.5)):
        parameters = {"weight": weights, "density": density, "gamma": gamma}
        ours = {"density": density, "gamma": gamma, "weights": tuple(weights)}
        peer = mergekit.merge_tensors([base, *tensors], "breadcrumbs", parameters=parameters, base_index=0)
        torch.testing.assert_close(apply(Breadcrumbs(**ours), *tensors), peer, rtol=1e-5, atol=1e-9)
        peer = mergekit.merge_tensors([base, *tensors], "breadcrumbs_ties", parameters=parameters, base_index=0)
        found = apply(BreadcrumbsTies(divide="none", draw="positive", **ours), *tensors)
        torch.testing.assert_close(found, peer, rtol=1e-5, atol=1e-9)
    sparsify = pytest.importorskip("mergekit.sparsify")
    assert sparsify.magnitude_outliers(torch.ones(1), 0.5) == 0
    assert apply(Breadcrumbs(density=0.5), torch.ones(1)) == 1


@pytest.mark.parametrize("kind", [Breadcrumbs, BreadcrumbsTies])
def test_what_it_cannot_do_is_refused(kind):
    for field in ("density", "gamma"):
        with pytest.raises(ValueError, match=f"{field} must be from 0 to 1"):
            kind(**{field: 1.01})
