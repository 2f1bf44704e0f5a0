"""Order statistics without sorting: those that sorting gives."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.methods import _select
from merge.methods._select import Chunks, Numbers, largest, magnitudes, places, quantiles
from tests.merge.memory import InMemory

DTYPES = [torch.float32, torch.float64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


WAYS = ["sorted", "counted", "between", "few between"]


@pytest.fixture
def way(request, monkeypatch):
    """A way in which little tensors could be looked at; the length of runs that goes with it."""
    name = request.param
    monkeypatch.setattr(_select, "SMALL", 1000 if name == "sorted" else 0)
    monkeypatch.setattr(_select, "KEPT", 1 << 20 if "between" in name else 0)
    monkeypatch.setattr(_select, "FEW", 0 if "few" in name else 1 << 30)
    monkeypatch.setattr(_select, "SAMPLED", 1)
    monkeypatch.setattr(_select, "PLACES", (1, 5))
    monkeypatch.setattr(_select, "APART", 7)
    return 1000 if name == "sorted" else 7


def numbers(*tensors: Tensor, run: int = 7) -> Numbers:
    """Tensors in runs, in memory that the next run overwrites."""
    return magnitudes(InMemory(tensors, run=run))


def passes(*tensors: Tensor, run: int = 7) -> Chunks:
    return numbers(*tensors, run=run).chunks


def sizes(dtype: torch.dtype, least: int = 1, most: int = 25) -> st.SearchStrategy[Tensor]:
    """Magnitudes: any, and few different ones, so that many are equal."""
    width = 32 if dtype == torch.float32 else 64
    anything = st.floats(min_value=0, allow_nan=False, allow_infinity=False, width=width)
    few = st.sampled_from([0.0, 1e-3, float(np.nextafter(NUMPY[dtype](1e-3), NUMPY[dtype](1))), 1.0, 2.0])
    lists = st.one_of(st.lists(anything, min_size=least, max_size=most), st.lists(few, min_size=least, max_size=most))
    return lists.map(lambda numbers: torch.tensor(numbers, dtype=dtype).abs())


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rank_holds_the_number_that_sorting_puts_there(dtype, way, data):
    values = data.draw(sizes(dtype))
    ordered = values.sort().values
    found = places(passes(values, run=way), values.numel(), [range(values.numel())])[0]
    for rank, place in found.items():
        assert place.value == ordered[rank].item()
        assert place.below == int((values < ordered[rank]).sum())
        assert place.equal == int((values == ordered[rank]).sum())


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_k_largest_are_exactly_k_and_the_first_of_equals(dtype, way, data):
    values = data.draw(sizes(dtype))
    elements = values.numel()
    order = torch.argsort(values, descending=True, stable=True)
    found = largest(numbers(values, run=way), [range(elements + 1)])[0]
    for count, chosen in found.items():
        expected = torch.zeros(elements, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(chosen.mask(values, 0), expected)
        cuts = sorted(data.draw(st.lists(st.integers(0, elements), max_size=4)))
        ends = [*cuts, elements]
        pieces = [chosen.mask(values[a:b], a) for a, b in zip([0, *cuts], ends, strict=True)]
        assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@given(values=sizes(torch.float64), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantiles_lie_between_their_neighbours_as_numpys_do(way, values, fractions):
    ordered = values.sort().values
    for fraction, found in zip(fractions, quantiles(passes(values, run=way), values.numel(), fractions), strict=True):
        position = fraction * (values.numel() - 1)
        low, high = ordered[int(position)].item(), ordered[min(int(position) + 1, values.numel() - 1)].item()
        assert low <= found <= high
        np.testing.assert_allclose(found, np.quantile(values.numpy(), fraction), rtol=1e-9, atol=1e-300)


def test_several_tensors_are_looked_at_in_the_same_passes():
    one, two = torch.rand(100), torch.randint(0, 5, (100,)).float()
    tensors = InMemory([one, two], run=7)
    first, second = places(magnitudes(tensors).chunks, 100, [{3, 50}, {99}])
    assert {rank: place.value for rank, place in first.items()} == {
        3: one.sort().values[3].item(),
        50: one.sort().values[50].item(),
    }
    assert second[99].value == two.max().item()
    assert tensors.passes == 3, "one run to see the dtype, and two passes for 31 bits"


def test_nothing_is_read_to_keep_all_or_none():
    tensors = InMemory([torch.rand(10)])
    found = largest(magnitudes(tensors), [{0, 10, 12}])[0]
    values = torch.tensor([0.0, 1.0, 2.0])
    assert not found[0].mask(values, 0).any()
    assert found[10].mask(values, 0).all() and found[12].mask(values, 0).all()
    assert tensors.passes == 0


KINDS = {
    "normal": lambda: torch.randn(400_000),
    "float64": lambda: torch.randn(300_000, dtype=torch.float64),
    "half": lambda: (torch.randn(300_000) * 0.02).half().float() - (torch.randn(300_000) * 0.02).half().float(),
    "few": lambda: torch.randint(-20, 20, (300_000,)).float() * 2.0**-14,
    "mostly zero": lambda: torch.randn(300_000) * (torch.rand(300_000) < 0.28),
    "zero": lambda: torch.zeros(300_000),
    "rows unlike": lambda: (torch.randn(600, 500) * torch.randn(600, 1).exp()).reshape(-1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [1e-5, 0.1, 0.3, 0.99999])
def test_one_pass_finds_the_largest_of_a_large_tensor(kind, density):
    torch.manual_seed(0)
    values = KINDS[kind]()
    tensors = InMemory([values], run=1 << 15)
    count = int(density * values.numel())
    mask = largest(magnitudes(tensors), [{count}])[0][count].mask(values.abs(), 0)
    expected = torch.zeros_like(mask)
    expected[values.abs().argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(mask, expected)
    assert tensors.passes <= 2, "one for the threshold, and a run of another for the last of equal ones"


@pytest.mark.parametrize("why", ["misled", "too many", "cannot look"])
def test_where_the_short_way_fails_the_long_one_finds_the_same(why, monkeypatch):
    torch.manual_seed(0)
    values = torch.randint(0, 5000, (50_000,)).float()
    tensors = InMemory([values], run=1 << 13)
    if why == "misled":
        tensors.look = lambda places, length: [torch.full((len(places) * length,), 4999.0)]
    elif why == "too many":
        monkeypatch.setattr(_select, "KEPT", 100)
    else:
        tensors.look = lambda places, length: None
    found = largest(magnitudes(tensors), [{20_000, 20_010}])[0]
    for count in (20_000, 20_010):
        expected = torch.zeros(50_000, dtype=torch.bool)
        expected[values.argsort(descending=True, stable=True)[:count]] = True
        assert torch.equal(found[count].mask(values, 0), expected)
    assert tensors.passes >= 4, "one run to see the dtype, two passes, and one to the last of equal ones"


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_neighbouring_floats_and_subnormals_are_told_apart(way):
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    values = torch.stack([above, one, torch.tensor(1e-45), torch.tensor(0.0), above])
    looked = numbers(values, run=way)
    assert largest(looked, [{2}])[0][2].mask(values, 0).tolist() == [True, False, False, False, True]
    assert largest(looked, [{4}])[0][4].mask(values, 0).tolist() == [True, True, True, False, True]
