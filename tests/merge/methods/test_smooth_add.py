from statistics import median

import pytest
import torch

from merge.methods import smooth_add
from merge.methods.add import Add
from merge.methods.smooth_add import SmoothAdd, blurred, median_filtered
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random


def mirrored(line, place):
    """The number at `place` of a line that goes on beyond its ends as its mirror image."""
    place %= 2 * len(line)
    return line[min(place, 2 * len(line) - 1 - place)]


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_the_median_is_of_the_neighbours_beyond_the_edges_too(width):
    line = random(7, inputs=1, dtype=torch.float64)[0]
    reach = width // 2
    expected = [median(mirrored(line.tolist(), i + k) for k in range(-reach, reach + 1)) for i in range(7)]
    assert median_filtered(line, width, [0]).tolist() == expected


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 3.0])
def test_the_gaussian_weighs_the_neighbours_beyond_the_edges_too(sigma):
    line = random(5, inputs=1, dtype=torch.float64)[0]
    reach = int(4 * sigma + 0.5)
    weights = torch.tensor(
        [-0.5 * (k / (sigma or 1)) ** 2 for k in range(-reach, reach + 1)], dtype=torch.float64
    ).exp()
    weights /= weights.sum()
    windows = [[mirrored(line.tolist(), i + k) for k in range(-reach, reach + 1)] for i in range(5)]
    expected = torch.tensor(windows, dtype=torch.float64) @ weights
    torch.testing.assert_close(blurred(line, sigma, [0]), expected, rtol=1e-12, atol=1e-17)


def test_by_default_only_the_places_of_a_kernel_are_neighbours():
    a, difference = random(6, 5, 3, 3, inputs=2)
    result = apply(SmoothAdd(), a, difference)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))

    def reordered(tensor):
        return tensor.reshape(30, 3, 3)[order].reshape(6, 5, 3, 3)

    assert same_bits(apply(SmoothAdd(), reordered(a), reordered(difference)), reordered(result))
    everywhere = apply(SmoothAdd(axes="all"), a, difference)
    assert not torch.equal(apply(SmoothAdd(axes="all"), reordered(a), reordered(difference)), reordered(everywhere))


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (6, 5, 1, 1)])
def test_what_has_no_kernel_gets_its_difference_as_it_is(shape):
    a, difference = random(*shape, inputs=2)
    assert same_bits(apply(SmoothAdd(weight=0.7), a, difference), apply(Add(weight=0.7), a, difference))


def test_a_lone_outlier_is_not_added_and_a_constant_is():
    a, outlier = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    outlier[0, 0, 2, 3] = 100.0
    assert not apply(SmoothAdd(), a, outlier).any()
    torch.testing.assert_close(apply(SmoothAdd(), a, torch.full_like(a, 0.3)), torch.full_like(a, 0.3))


def test_large_tensors_are_filtered_in_parts(monkeypatch):
    tensor = random(9, 4, 3, 3, inputs=1)[0]
    whole = median_filtered(tensor, 3, [0, 1, 2, 3])
    monkeypatch.setattr(smooth_add, "SLAB", 1)
    assert same_bits(median_filtered(tensor, 3, [0, 1, 2, 3]), whole)


@pytest.mark.parametrize(("field", "value"), [("median", 0), ("median", 2), ("sigma", -1.0)])
def test_widths_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        SmoothAdd(**{field: value})


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (12, 7), (9,), (6, 5, 1, 1)])
@pytest.mark.parametrize(("width", "sigma"), [(3, 1.0), (5, 0.4), (1, 2.5)])
def test_along_all_axes_scipy_agrees_and_so_supermerger(shape, width, sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    a, difference = random(*shape, inputs=2, dtype=torch.float64)
    filtered = ndimage.gaussian_filter(ndimage.median_filter(difference.numpy(), size=width), sigma=sigma)
    method = SmoothAdd(weight=0.7, median=width, sigma=sigma, axes="all")
    result = apply(method, a, difference, dtype=torch.float64)
    torch.testing.assert_close(result, a + 0.7 * torch.from_numpy(filtered), rtol=1e-10, atol=1e-16)
