"""Ways to thin a difference out: what is kept, and what it is worth."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge.methods._rows import rows, width
from merge.methods._sparsify import Sparsify, drop, drop_by_rank, mean_ranks, middle, trim
from merge.methods._totals import total
from tests.merge import memory
from tests.merge.memory import InMemory, same_bits
from tests.merge.methods.tensors import CASES, random, rounded


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """So that little tensors are looked at in many chunks."""
    monkeypatch.setattr(memory, "GRID", 50)


def left(sparsify: Sparsify, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is left of each tensor, worked out in odd runs."""
    kept: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        flat = tensor.reshape(-1)
        cuts = range(0, flat.numel(), 37)
        found = torch.empty_like(flat)
        for start in cuts:
            sparsify(index, flat[start : start + 37].clone(), start, found[start : start + 37])
        kept.append(found.reshape(tensor.shape))
    return kept


def count(density: float, elements: int) -> int:
    """Peers' rounding, and one number at least."""
    return max(1, int(density * elements)) if elements and density > 0 else 0


def middle_of(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """The largest left out and the next largest kept, by sorting."""
    elements = tensor.numel()
    kept = count(density, elements)
    dropped = min(int(gamma * elements), elements - kept)
    order = torch.argsort(tensor.reshape(-1).abs(), descending=True, stable=True)
    chosen = order[dropped : dropped + kept]
    expected = torch.zeros(elements)
    expected[chosen] = tensor.reshape(-1)[chosen]
    return expected.reshape(tensor.shape)


@pytest.mark.parametrize("name", CASES)
def test_trimming_keeps_exactly_the_largest(name):
    tensors = CASES[name]
    for density in (0.0, 0.003, 0.125, 0.5, 1.0):
        for before, after in zip(tensors, left(trim(InMemory(tensors), density), tensors), strict=True):
            assert torch.equal(after, middle_of(before, density, 0)), density


@pytest.mark.parametrize("name", CASES)
def test_breadcrumbs_are_what_lies_between_the_largest_and_the_smallest(name):
    tensors = CASES[name]
    for density, gamma in ((0.5, 0.25), (0.9, 0.01), (0.75, 0.5), (0.001, 0.5), (0.0, 0.5), (1, 1)):
        for before, after in zip(tensors, left(middle(InMemory(tensors), density, gamma), tensors), strict=True):
            assert torch.equal(after, middle_of(before, density, gamma)), (density, gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [None, "row", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_at_random_is_divided_by_its_probability(name, ranks, dtype):
    tensors = [tensor.to(dtype) for tensor in CASES[name]]
    held = InMemory(tensors)
    if ranks is None:
        after = left(drop(held, 0.25, 1, "inverse"), tensors)
        bare = left(drop(held, 0.25, 1, "none"), tensors)
    else:
        after = left(drop_by_rank(held, 0.25, 0.125, ranks, 1, "inverse"), tensors)
        bare = left(drop_by_rank(held, 0.25, 0.125, ranks, 1, "none"), tensors)
    for before, one, other in zip(tensors, after, bare, strict=True):
        assert torch.equal(other, torch.where(other != 0, before, 0))
        assert torch.equal(one != 0, other != 0)
        factors = (one / other)[other.abs() > 1e-30]
        bounds = (4, 4) if ranks is None else (1 / 0.375 - 1e-5, 8 + 1e-5)
        assert ((factors >= bounds[0]) & (factors <= bounds[1])).all()


@pytest.mark.parametrize("thin", ["drop", "row", "tensor"])
def test_on_average_over_seeds_nothing_is_lost(thin):
    """DARE's and DELLA's claim, number by number: within 5 standard errors of the difference."""
    tensors = random(8, 25, inputs=2)
    seeds, density = 200, 0.3
    sums = [torch.zeros(8, 25, dtype=torch.float64) for _ in tensors]
    for seed in range(seeds):
        held = InMemory(tensors)
        if thin == "drop":
            sparsify = drop(held, density, seed, "inverse")
        else:
            sparsify = drop_by_rank(held, density, 0.2, "row" if thin == "row" else "tensor", seed, "inverse")
        for found, kept in zip(sums, left(sparsify, tensors), strict=True):
            found += kept
    least = density if thin == "drop" else density - 0.2
    for before, found in zip(tensors, sums, strict=True):
        error = (found / seeds - before).abs() / before.abs()
        assert (error < 5 * ((1 - least) / least / seeds) ** 0.5).all()
        assert error.mean() > 0.02, "masks do differ from seed to seed"


@pytest.mark.parametrize("ranks", [None, "row", "tensor"])
def test_rescaled_by_the_norm_the_sum_of_absolute_values_is_what_it_was(ranks):
    tensors = [*random(30, 40, inputs=2), torch.zeros(30, 40)]
    held = InMemory(tensors)
    if ranks is None:
        after = left(drop(held, 0.2, 0, "norm"), tensors)
    else:
        after = left(drop_by_rank(held, 0.2, 0.1, ranks, 0, "norm"), tensors)
    for before, one in zip(tensors, after, strict=True):
        torch.testing.assert_close(one.double().abs().sum(), before.double().abs().sum(), rtol=1e-6, atol=0)
    assert (after[0] == 0).double().mean() > 0.7


def test_when_everything_is_dropped_nothing_is_rescaled():
    tensors = random(5, 5)
    for rescale in ("inverse", "norm", "none"):
        assert all(not kept.any() for kept in left(drop(InMemory(tensors), 0.0, 0, rescale), tensors))


def test_with_a_window_of_no_width_ranks_do_not_matter():
    tensors = rounded(30, 40)
    plain = left(drop(InMemory(tensors), 0.4, 3, "inverse"), tensors)
    for ranks in ("row", "tensor"):
        found = left(drop_by_rank(InMemory(tensors), 0.4, 0.0, ranks, 3, "inverse"), tensors)
        assert all(same_bits(a, b) for a, b in zip(plain, found, strict=True))


def probabilities(tensor: Tensor, density: float, epsilon: float, ranks: str) -> np.ndarray:
    """In the plainest way: the mean rank of each number among those of its row, or of the tensor."""
    sizes = tensor.abs().double().numpy()
    together = sizes.reshape(sizes.shape[0], -1) if ranks == "row" and sizes.ndim > 1 else sizes.reshape(1, -1)
    if together.shape[1] == 1:
        together = together.reshape(1, -1)
    found = np.empty_like(together)
    for row, numbers in enumerate(together):
        for place, number in enumerate(numbers):
            rank = (numbers < number).sum() + ((numbers == number).sum() - 1) / 2
            found[row, place] = rank / (len(numbers) - 1) if len(numbers) > 1 else 0.5
    return np.clip(density - epsilon + 2 * epsilon * found, 0, 1).reshape(sizes.shape)


@pytest.mark.parametrize("epsilon", [0.2, -0.2])
@pytest.mark.parametrize("ranks", ["row", "tensor"])
@pytest.mark.parametrize(
    "name", ["matrix", "convolution", "1x1 convolution", "rows of one", "one row", "vector", "scalar", "constant"]
)
def test_the_probability_goes_up_with_the_rank(name, ranks, epsilon):
    """It is read off the factors 1 / p of what is kept."""
    tensor = CASES[name][0]
    expected = torch.from_numpy(probabilities(tensor, 0.5, epsilon, ranks))
    kept = left(drop_by_rank(InMemory([tensor]), 0.5, epsilon, ranks, 0, "inverse"), [tensor])[0]
    found = (tensor.double() / kept.double())[kept != 0]
    tolerance = 0.2 * 0.5 / 254 * 2 + 1e-6 if ranks == "row" else tied(tensor) * 0.2 + 1e-6
    assert (found - expected[kept != 0]).abs().max() <= tolerance if kept.any() else True


def tied(tensor: Tensor) -> float:
    """The largest share of numbers that are within 1 part in 128 of each other."""
    sizes = tensor.abs().double().reshape(-1)
    near = (sizes[:, None] - sizes[None]).abs() <= sizes[:, None] / 128
    return near.sum(1).max().item() / sizes.numel()


@pytest.mark.parametrize("ranks", ["row", "tensor"])
def test_numbers_that_are_all_equal_are_in_the_middle(ranks):
    tensor = torch.full((6, 8), -0.3)
    kept = left(drop_by_rank(InMemory([tensor]), 0.25, 0.25, ranks, 0, "inverse"), [tensor])[0]
    assert 5 < (kept != 0).sum() < 25
    torch.testing.assert_close(kept, torch.where(kept != 0, -1.2, 0.0))


def test_numbers_that_differ_are_ranked_in_the_tensor_as_sorting_ranks_them():
    tensor = 2.0 ** torch.arange(0, -64, -0.25)
    kept = left(drop_by_rank(InMemory([tensor]), 0.5, 0.25, "tensor", 0, "inverse"), [tensor])[0]
    expected = torch.linspace(0.75, 0.25, 256)
    torch.testing.assert_close((tensor / kept)[kept != 0], expected[kept != 0])


def test_equal_magnitudes_have_equal_probabilities():
    tensor = rounded(40, 30)[0]
    for ranks in ("row", "tensor"):
        kept = left(drop_by_rank(InMemory([tensor]), 0.5, 0.3, ranks, 0, "inverse"), [tensor])[0]
        chances = torch.where(kept != 0, tensor / kept, torch.nan)
        for row in range(40) if ranks == "row" else [slice(None)]:
            sizes, chance = tensor[row].abs(), chances[row]
            for size in sizes.unique():
                found = chance[(sizes == size) & ~chance.isnan()]
                assert found.numel() == 0 or (found.max() - found.min()) < 1e-5


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_mean_ranks_are_those_of_counting(data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    numbers = st.lists(st.integers(0, 5), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    values = torch.tensor(data.draw(numbers)).float().reshape(shape)
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    assert torch.equal(mean_ranks(values), below + (equal - 1) / 2)


@pytest.mark.parametrize("name", CASES)
def test_rows_come_whole_and_in_order(name):
    tensors = CASES[name]
    wide = width(tuple(tensors[0].shape))
    joined: list[list[Tensor]] = [[] for _ in tensors]
    row = 0
    for first, run in rows(InMemory(tensors)):
        assert first == row
        row += run[0].shape[0]
        for pieces, values in zip(joined, run, strict=True):
            assert values.shape[1] == wide
            pieces.append(values.clone())
    for pieces, tensor in zip(joined, tensors, strict=True):
        assert torch.equal(
            torch.cat([tensor.new_empty(0), *[piece.reshape(-1) for piece in pieces]]), tensor.reshape(-1)
        )
    expected = {"1x1 convolution": 16, "depthwise": 9, "rows of one": 40, "one row": 50, "vector": 64, "scalar": 1}
    assert wide == expected.get(name, wide)


@pytest.mark.parametrize("elements", [0, 1, 2, 7, 1000, 1 << 15])
def test_totals_are_exact_to_the_last_digits(elements):
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = values.clone()
    assert total(values) == pytest.approx(float(np.sum(values.numpy(), dtype=np.longdouble)), rel=1e-12, abs=1e-300)
    assert torch.equal(values, before)
