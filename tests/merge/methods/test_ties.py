import pytest
import torch

from merge.methods.ties import Ties
from tests.merge import memory
from tests.merge.memory import apply
from tests.merge.methods.sparse import consensus, trimmed
from tests.merge.methods.tensors import CASES, random
from tuner.errors import ConfigError


@pytest.mark.parametrize("name", CASES)
def test_it_trims_elects_and_merges(name, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    weights = (1.0, 0.5, 2.0)  # sums that cancel in float64 cancel in float32
    for density in (0.0, 0.25, 0.5, 1.0):
        expected = 1.5 * consensus([trimmed(tensor, density) for tensor in CASES[name]], weights)
        method = Ties(density=density, weights=weights, scale=1.5)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
            found = apply(method, *CASES[name], dtype=dtype)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_the_papers_example():
    """Figure 1 of the paper in numbers: redundant values go, the mean is over those that agree."""
    one = torch.tensor([3.0, 0.1, -2.0, 0.0, 4.0])
    two = torch.tensor([1.0, -5.0, 4.0, 0.2, -4.0])
    found = apply(Ties(density=0.6), one, two)
    # of each the three largest: [3, ., -2, ., 4] and [., -5, 4, ., -4]
    torch.testing.assert_close(found, torch.tensor([3.0, -5.0, 4.0, 0.0, 0.0]))


def test_a_draw_is_zero_or_positive_as_it_is_said():
    one, two = torch.tensor([2.0]), torch.tensor([-2.0])
    assert apply(Ties(density=1), one, two).item() == 0
    assert apply(Ties(density=1, draw="positive"), one, two).item() == 2


def test_equal_differences_are_kept_untrimmed_and_trimmed_alike():
    delta = random(8, 9, inputs=1)[0]
    assert torch.equal(apply(Ties(density=1), delta, delta), delta)
    assert torch.equal(apply(Ties(density=0.5), delta, delta).double(), trimmed(delta, 0.5))


def test_mergekits_is_with_draws_for_positive():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    tensors, weights = random(20, 30, dtype=torch.float64), [1.0, 0.5, 2.0]
    base = torch.zeros_like(tensors[0])
    for density in (0.25, 1.0):
        for divide in ("weights", "none"):
            parameters = {
                "weight": weights,
                "density": density,
                "normalize": divide == "weights",
                "lambda": 0.7,
            }
            peer = mergekit.merge_tensors([base, *tensors], "ties", parameters=parameters, base_index=0)
            ours = Ties(density=density, weights=tuple(weights), divide=divide, scale=0.7, draw="positive")
            found = apply(ours, *tensors, dtype=torch.float64)
            torch.testing.assert_close(found, peer, rtol=1e-13, atol=0)
    pair = [torch.tensor([2.0]), torch.tensor([-2.0])]
    drawn = mergekit.merge_tensors(
        [torch.zeros(1), *pair], "ties", parameters={"weight": 1.0, "density": 1.0}, base_index=0
    )
    assert drawn == apply(Ties(density=1, draw="positive"), *pair)


def test_mergekit_divides_by_what_may_vanish_if_a_weight_is_negative():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    pair = [torch.tensor([1.0]), torch.tensor([-1.0])]
    parameters = {"weight": [1.0, -0.999], "density": 1.0}
    peer = mergekit.merge_tensors([torch.zeros(1), *pair], "ties", parameters=parameters, base_index=0)
    assert peer.item() == pytest.approx(1999, rel=1e-3)
    assert apply(Ties(density=1, weights=(1.0, -0.999)), *pair).item() == pytest.approx(1)


@pytest.mark.parametrize(("elect", "method"), [("sum", "total"), ("count", "frequency")])
def test_pefts_is_without_weights_in_the_election_and_divided_by_count(elect, method):
    peft = pytest.importorskip("peft.utils.merge_utils")
    tensors, weights = random(20, 30, dtype=torch.float64), (1.0, -0.5, 2.0)
    for density in (0.25, 0.999999):
        peer = peft.ties(tensors, torch.tensor(weights), density, method)
        ours = Ties(density=density, weights=weights, elect=elect, draw="positive", divide="count")
        torch.testing.assert_close(apply(ours, *tensors, dtype=torch.float64), peer, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("elect", "vote_sgn"), [("sum", True), ("count", False)])
def test_sd_mechas_is_without_weights(elect, vote_sgn):
    mecha = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
    tensors = [tensor.double() for tensor in random(20, 30)]  # it trims in float32
    peer = mecha.ties_sum.__wrapped__(*tensors, k=1.0, vote_sgn=vote_sgn)
    ours = Ties(density=1, elect=elect, divide="count")
    torch.testing.assert_close(apply(ours, *tensors, dtype=torch.float64), peer, rtol=1e-13, atol=0)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"density must be from 0 to 1, got -0\.1"):
        Ties(density=-0.1)
    with pytest.raises(ConfigError, match="weights: 2 of them for 3 inputs"):
        apply(Ties(weights=(1.0, 1.0)), *random(4))
