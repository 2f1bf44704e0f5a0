import numpy as np
import pytest
import torch

from merge.methods.distribution_crossover import DistributionCrossover
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import relative, tensors


def directly(a, b, c, alpha, beta):
    """The formula in numpy: both spectra, mixed, in the order of c."""
    x, y, z = (tensor.double().reshape(-1).numpy() for tensor in (a, b, c))
    order = np.argsort(z, kind="stable")
    p, q = np.fft.rfft(x[order]), np.fft.rfft(y[order])
    f = np.arange(len(p)) / len(p)
    h = np.clip((f - alpha) / beta + 0.5, 0, 1) if beta > 0 else (f >= alpha).astype(float)
    result = np.empty_like(x)
    result[order] = np.fft.irfft((1 - h) * p + h * q, len(x))
    return torch.from_numpy(result).reshape(a.shape)


@pytest.mark.parametrize("shape", [(2,), (31,), (6, 50), (6, 5, 3, 3), (101, 1, 1, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.2, 0.0), (0.4, 0.3), (0.9, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_frequencies_are_as_and_high_ones_bs(shape, alpha, beta, dtype):
    given = [tensor.to(dtype) for tensor in tensors(*shape, count=3)]
    result = apply(DistributionCrossover(alpha=alpha, beta=beta), *given, dtype=dtype)
    assert relative(result, directly(*given, alpha, beta)) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_what_changes_slowly_along_c_is_taken_from_a():
    c = torch.linspace(-1, 1, 1000, dtype=torch.float64)[
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    ]
    slow = [torch.cos(torch.pi * cycles * (c + 1)) for cycles in (2, 3)]
    fast = [torch.cos(torch.pi * cycles * (c + 1)) for cycles in (300, 310)]
    result = apply(DistributionCrossover(alpha=0.3), slow[0] + fast[0], slow[1] + fast[1], c, dtype=torch.float64)
    assert relative(result, slow[0] + fast[1]) < 0.1


def test_numbers_that_are_equal_in_c_stay_in_their_order():
    a, b = tensors(400, count=2)
    flat = torch.zeros(400)
    result = apply(DistributionCrossover(), a, b, flat, dtype=torch.float64)
    assert relative(result, directly(a, b, torch.arange(400.0), 0.5, 0.0)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(dtype, shape):
    a, c = tensors(*shape, count=2, dtype=dtype)
    assert same_bits(apply(DistributionCrossover(alpha=0.3, beta=0.2), a, a.clone(), c, dtype=dtype), a)


def test_a_single_number_is_between_the_two():
    numbers = [torch.tensor(number) for number in (1.0, 5.0, 0.0)]
    assert apply(DistributionCrossover(alpha=0.25), *numbers).item() == 4.0


@pytest.mark.parametrize(("alpha", "which"), [(0.0, 1), (1.0, 0)])
def test_the_ends_are_the_inputs(alpha, which):
    given = tensors(301, count=3)
    method = DistributionCrossover(alpha=alpha)
    assert method.unchanged() == which
    assert relative(apply(method, *given, dtype=torch.float64), given[which]) < 1e-14
    assert DistributionCrossover(alpha=alpha, beta=0.1).unchanged() is None


def test_runs_do_not_matter():
    given = tensors(700, count=3, dtype=torch.float32)
    method = DistributionCrossover(alpha=0.3, beta=0.2)
    assert same_bits(apply(method, *given), apply(method, *given, runs=[1, 0, 299, 400]))
