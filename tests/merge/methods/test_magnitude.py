import pytest
import torch

from merge.methods.magnitude import Magnitude
from tests.merge import memory
from tests.merge.memory import apply
from tests.merge.methods.sparse import added_up, trimmed
from tests.merge.methods.tensors import CASES, random, rounded
from tuner.errors import ConfigError


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_weighted_sum_of_what_trimming_leaves(name, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    weights = (1.0, -0.5, 2.0)
    for density in (0.0, 0.25, 0.5, 1.0):
        left = [trimmed(tensor, density) for tensor in CASES[name]]
        expected = 0.5 * added_up(left, weights)
        size = added_up([tensor.abs() for tensor in left], (1.0, 0.5, 2.0))  # of what may cancel
        method = Magnitude(density=density, weights=weights, scale=0.5)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
            found = apply(method, *CASES[name], dtype=dtype)
            assert ((found.double() - expected).abs() <= tolerance * size).all(), density


def test_of_a_million_numbers_with_masses_of_ties_exactly_the_part_is_kept():
    tensor = rounded(1000, 1000, inputs=1, dtype=torch.bfloat16)[0]
    assert tensor.unique().numel() < 10_000
    found = apply(Magnitude(density=0.1), tensor)
    kept = found != 0
    assert kept.sum() == 100_000
    threshold = tensor[kept].abs().min()
    assert not ((tensor.abs() > threshold) & ~kept).any()
    ties = (tensor.abs() == threshold).reshape(-1).nonzero()
    among = kept.reshape(-1)[ties.reshape(-1)]
    assert 1 < among.sum() < ties.numel(), "some of the equal ones"
    assert torch.equal(among, torch.arange(ties.numel()) < among.sum()), "and of them the first"


def test_normalized_it_is_a_weighted_mean():
    tensors = random(6, 7)
    found = apply(Magnitude(density=1, weights=(3.0, 2.0, 5.0), normalize=True), *tensors, dtype=torch.float64)
    torch.testing.assert_close(found, added_up(tensors, (0.3, 0.2, 0.5)))


def test_an_input_without_weight_is_not_looked_at():
    a, _, c = random(6, 7)
    b = torch.full_like(a, torch.nan)
    found = apply(Magnitude(density=1, weights=(1.0, 0.0, 1.0)), a, b, c)
    assert torch.equal(found, a + c)


def test_peft_agrees_but_drops_what_has_less_than_one_number_to_keep():
    peft = pytest.importorskip("peft.utils.merge_utils")
    tensors, weights = random(32, 25, dtype=torch.float64), (1.0, -0.5, 2.0)
    for density in (0.1, 0.25, 0.75):
        peer = peft.magnitude_prune(tensors, torch.tensor(weights), density)
        found = apply(Magnitude(density=density, weights=weights), *tensors, dtype=torch.float64)
        torch.testing.assert_close(found, peer, rtol=1e-14, atol=1e-18)
    scalar = random()[0]
    assert peft.magnitude_prune([scalar], torch.tensor([1.0]), 0.5) == 0
    assert apply(Magnitude(density=0.5), scalar) == scalar


def test_mergekit_agrees_also_on_small_tensors():
    mergekit = pytest.importorskip("mergekit.sparsify")
    for shape in ((32, 25), (3,), (1,), ()):
        for density in (0.0, 0.1, 0.5, 1.0):
            tensor = random(*shape, inputs=1)[0]
            assert torch.equal(apply(Magnitude(density=density), tensor), mergekit.magnitude(tensor, density))


def test_sd_mecha_keeps_one_more_and_all_that_equal_it():
    mecha = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
    distinct, tied = random(10, 10, inputs=1)[0], rounded(40, 40, inputs=1, dtype=torch.bfloat16)[0]
    assert mecha.filter_top_k(distinct, 0.5).count_nonzero() == 51
    assert apply(Magnitude(density=0.5), distinct).count_nonzero() == 50
    assert mecha.filter_top_k(tied, 0.5).count_nonzero() > 801
    assert apply(Magnitude(density=0.5), tied).count_nonzero() == 800


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"density must be from 0 to 1, got 1\.5"):
        Magnitude(density=1.5)
    with pytest.raises(ValueError, match="add up to 0"):
        Magnitude(weights=(1.0, -1.0), normalize=True)
    with pytest.raises(ConfigError, match="weights: 2 of them for 3 inputs"):
        apply(Magnitude(weights=(1.0, 1.0)), *random(4))
