import math
from itertools import product

import numpy as np
import pytest
import torch

from merge.methods._gram import Vectors, gram
from merge.methods.base import GRID
from tests.merge.memory import InMemory
from tests.merge.spheres import at_angle, frame, tensors

PER = ("tensor", "rows", "columns", "last")


def as_vectors(tensor, per):
    """`[G, length]`: the vectors of a tensor, taken apart the plain way."""
    match per:
        case "tensor":
            return tensor.reshape(1, -1)
        case "rows":
            return tensor.flatten(1)
        case "columns":
            return tensor.flatten(1).T
        case "last":
            return tensor.reshape(-1, tensor.shape[-1])


SHAPES = [(7, 5, 3, 3), (40, 30), (300, 1000), (2, GRID + 1), (GRID + 1, 2), (3 * GRID // 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per", PER)
def test_sums_are_those_of_the_vectors_however_rows_fall_into_runs(shape, per):
    inputs = tensors(*shape, count=3)
    found = gram(InMemory(inputs), per)
    taken = [as_vectors(tensor, per) for tensor in inputs]
    for i, j in product(range(3), repeat=2):
        inner = (taken[i] * taken[j]).sum(1).numpy()
        apart = ((taken[i] - taken[0]) * (taken[j] - taken[0])).sum(1).numpy()
        scale = (taken[i].norm(dim=1) * taken[j].norm(dim=1)).numpy()
        assert np.all(abs(found.inputs[i, j] - inner) <= 1e-14 * scale)
        assert np.all(abs(found.differences[i, j] - apart) <= 1e-13 * scale)


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (40, 30), (5,)])
@pytest.mark.parametrize("per", PER)
def test_numbers_belong_to_the_vector_that_they_were_summed_into(shape, per):
    vectors = Vectors.of(shape, per)
    numbers = math.prod(shape)
    index = torch.arange(numbers).reshape(shape)
    if len(shape) > 1:
        expected = torch.empty(numbers, dtype=torch.int64)
        for which, members in enumerate(as_vectors(index, per)):
            expected[members] = which
    else:
        expected = torch.zeros(numbers, dtype=torch.int64)
    for start, count in ((0, numbers), (3, 2)):
        place = torch.empty(count, dtype=torch.int64)
        vectors.which(start, place)
        assert torch.equal(place, expected[start : start + count])


@pytest.mark.parametrize("shape", [(), (1,), (9,), (9, 1), (9, 1, 1, 1)])
@pytest.mark.parametrize("per", ["rows", "last"])
def test_a_tensor_whose_vectors_would_be_single_numbers_is_one_vector(shape, per):
    assert Vectors.of(shape, per).count == 1


def test_an_empty_tensor_has_zero_length():
    found = gram(InMemory([torch.zeros(0, 4), torch.zeros(0, 4)]))
    assert found.norms.tolist() == [[0], [0]]
    assert found.angle(0, 1).tolist() == [0]


@pytest.mark.parametrize("theta", [1e-10, 1e-6, 1e-4, 1e-2, 1.0, math.pi / 2, 3.0, math.pi - 1e-4])
def test_small_angles_keep_their_digits(theta):
    a, b = at_angle(theta)
    found = gram(InMemory([a, b]))
    rounding = 1e-15 / theta + 1e-16 / (math.pi - theta) ** 2  # of the numbers that a and b are made of
    assert found.angle(0, 1).item() == pytest.approx(theta, rel=10 * rounding)


def test_an_angle_does_not_depend_on_lengths():
    a, b = at_angle(1e-3)
    for scale in (1e-30, 1e-3, 7.0, 1e20):
        assert gram(InMemory([a, scale * b])).angle(0, 1).item() == pytest.approx(1e-3, rel=1e-8)


def test_distances_are_those_of_differences():
    x, y, z = frame(3)
    found = gram(InMemory([x, x + 1e-9 * y, x + 1e-9 * z]))
    assert found.distance(0, 1).item() == pytest.approx(1e-9, rel=1e-6)
    assert found.distance(1, 2).item() == pytest.approx(math.sqrt(2) * 1e-9, rel=1e-6)


def test_equal_inputs_are_no_distance_apart():
    a, b = tensors(1000, count=2)
    found = gram(InMemory([a, b, b.clone(), a.clone()]))
    assert (found.distance(1, 2), found.distance(0, 3), found.angle(1, 2), found.angle(0, 3)) == (0, 0, 0, 0)


def test_the_sums_are_the_same_bits_for_any_number_of_threads():
    inputs = InMemory(tensors(600, 700, count=2, dtype=torch.float32))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([gram(inputs, per) for per in PER])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one.inputs, two.inputs) and np.array_equal(one.differences, two.differences)


def test_the_order_of_a_sum_is_that_of_halves():
    numbers = tensors(1001, count=1)[0]

    def halves(terms):
        while len(terms) > 1:
            middle = (len(terms) + 1) // 2
            terms = [x + y for x, y in zip(terms[:middle], [*terms[middle:], 0.0], strict=False)]
        return terms[0]

    assert gram(InMemory([numbers, numbers])).inputs[0, 0].item() == halves([x * x for x in numbers.tolist()])
