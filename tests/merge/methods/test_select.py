"""Order statistics without sorting: those that sorting gives."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.methods import _select
from merge.methods._select import Chunks, largest, places, quantiles

DTYPES = [torch.float32, torch.float64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


@pytest.fixture(params=["sorted", "counted"])
def way(request, monkeypatch):
    """Both ways in which little tensors could be looked at."""
    monkeypatch.setattr(_select, "SMALL", 1000 if request.param == "sorted" else 0)
    return 1000 if request.param == "sorted" else 7


def passes(*tensors: Tensor, run: int = 7) -> Chunks:
    """Tensors in runs, in memory that the next run overwrites."""

    def chunks() -> Iterator[tuple[int, list[Tensor]]]:
        lent = [torch.empty(run, dtype=tensor.dtype) for tensor in tensors]
        for start in range(0, tensors[0].numel(), run):
            pieces = [tensor[start : start + run] for tensor in tensors]
            yield start, [memory[: piece.numel()].copy_(piece) for memory, piece in zip(lent, pieces, strict=True)]

    return chunks


def sizes(dtype: torch.dtype, least: int = 1, most: int = 60) -> st.SearchStrategy[Tensor]:
    """Magnitudes: any, and few different ones, so that many are equal."""
    width = 32 if dtype == torch.float32 else 64
    anything = st.floats(min_value=0, allow_nan=False, allow_infinity=False, width=width)
    few = st.sampled_from([0.0, 1e-3, float(np.nextafter(NUMPY[dtype](1e-3), NUMPY[dtype](1))), 1.0, 2.0])
    lists = st.one_of(st.lists(anything, min_size=least, max_size=most), st.lists(few, min_size=least, max_size=most))
    return lists.map(lambda numbers: torch.tensor(numbers, dtype=dtype).abs())


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rank_holds_the_number_that_sorting_puts_there(dtype, way, data):
    values = data.draw(sizes(dtype))
    ordered = values.sort().values
    found = places(passes(values, run=way), values.numel(), [range(values.numel())])[0]
    for rank, place in found.items():
        assert place.value == ordered[rank].item()
        assert place.below == int((values < ordered[rank]).sum())
        assert place.equal == int((values == ordered[rank]).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_k_largest_are_exactly_k_and_the_first_of_equals(dtype, way, data):
    values = data.draw(sizes(dtype))
    elements = values.numel()
    order = torch.argsort(values, descending=True, stable=True)
    found = largest(passes(values, run=way), elements, [range(elements + 1)])[0]
    for count, chosen in found.items():
        expected = torch.zeros(elements, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(chosen.mask(values, 0), expected)
        cuts = sorted(data.draw(st.lists(st.integers(0, elements), max_size=4)))
        ends = [*cuts, elements]
        pieces = [chosen.mask(values[a:b], a) for a, b in zip([0, *cuts], ends, strict=True)]
        assert torch.equal(torch.cat(pieces), expected)


@given(values=sizes(torch.float64), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantiles_lie_between_their_neighbours_as_numpys_do(way, values, fractions):
    ordered = values.sort().values
    for fraction, found in zip(fractions, quantiles(passes(values, run=way), values.numel(), fractions), strict=True):
        position = fraction * (values.numel() - 1)
        low, high = ordered[int(position)].item(), ordered[min(int(position) + 1, values.numel() - 1)].item()
        assert low <= found <= high
        np.testing.assert_allclose(found, np.quantile(values.numpy(), fraction), rtol=1e-9, atol=1e-300)


def test_several_tensors_are_looked_at_in_the_same_passes():
    one, two = torch.rand(100), torch.randint(0, 5, (100,)).float()
    counted = [0]
    inner = passes(one, two)

    def chunks() -> Iterator[tuple[int, list[Tensor]]]:
        counted[0] += 1
        yield from inner()

    first, second = places(chunks, 100, [{3, 50}, {99}])
    assert {rank: place.value for rank, place in first.items()} == {
        3: one.sort().values[3].item(),
        50: one.sort().values[50].item(),
    }
    assert second[99].value == two.max().item()
    assert counted[0] == 3, "one run to see the dtype, and two passes for 31 bits"


def test_nothing_is_read_to_keep_all_or_none():
    def chunks() -> Iterator[tuple[int, list[Tensor]]]:
        raise AssertionError("read")

    found = largest(chunks, 10, [{0, 10, 12}])[0]
    values = torch.tensor([0.0, 1.0, 2.0])
    assert not found[0].mask(values, 0).any()
    assert found[10].mask(values, 0).all() and found[12].mask(values, 0).all()


def test_neighbouring_floats_and_subnormals_are_told_apart(way):
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    values = torch.stack([above, one, torch.tensor(1e-45), torch.tensor(0.0), above])
    chunks = passes(values, run=way)
    assert largest(chunks, 5, [{2}])[0][2].mask(values, 0).tolist() == [True, False, False, False, True]
    assert largest(chunks, 5, [{4}])[0][4].mask(values, 0).tolist() == [True, True, True, False, True]
