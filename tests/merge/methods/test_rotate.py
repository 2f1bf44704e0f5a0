import math

import pytest
import torch

from merge.methods.rotate import Rotate, nearest_rotation, power
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import relative, tensors


def rotation(n, *, seed=0, largest=3.0):
    """A rotation of which no plane turns by more than `largest`, and its generator."""
    half = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generator = half - half.T
    generator = generator * (largest / torch.linalg.matrix_norm(generator, 2))
    return torch.linalg.matrix_exp(generator), generator


def eye(n):
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 9, 40])
@pytest.mark.parametrize("largest", [1e-6, 1e-2, 1.0, 3.1])
@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
def test_a_power_of_a_rotation_goes_that_share_of_the_way(n, largest, exponent):
    q, generator = rotation(n, largest=largest)
    assert (power(q, exponent) - torch.linalg.matrix_exp(exponent * generator)).abs().max() < 1e-11


def test_planes_that_share_an_angle_do_no_harm():
    q, _ = rotation(2, largest=1.0)
    blocks = torch.block_diag(q, q, q.T, eye(3), q)
    frame, _ = rotation(11, seed=1)
    turned = frame @ blocks @ frame.T
    half = power(turned, 0.5)
    assert (half @ half - turned).abs().max() < 1e-13
    assert (half @ half.T - eye(11)).abs().max() < 1e-13


def test_half_turns_are_halved_too():
    frame, _ = rotation(6, seed=1)
    turned = frame @ torch.diag(torch.tensor([-1.0, -1, -1, -1, 1, 1], dtype=torch.float64)) @ frame.T
    half = power(turned, 0.5)
    assert (half @ half - turned).abs().max() < 1e-12
    assert (half @ half.T - eye(6)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_nearest_rotation_is_one_and_finds_one(n):
    q, _ = rotation(n)
    stretched = q @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64))
    assert (nearest_rotation(q) - q).abs().max() < 1e-13
    found = nearest_rotation(stretched)
    assert (found @ found.T - eye(n)).abs().max() < 1e-13
    assert torch.linalg.det(found).item() == pytest.approx(1)


def test_a_reflection_is_given_up_where_it_costs_least():
    values = torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64)
    assert (nearest_rotation(torch.diag(values)) - eye(3)).abs().max() < 1e-14
    values = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    assert (nearest_rotation(torch.diag(values)).diag() - torch.tensor([1.0, -1, -1])).abs().max() < 1e-14


def test_what_the_points_do_not_say_stays_in_place():
    q, _ = rotation(3)
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[:3, :3] = q
    assert (nearest_rotation(matrix) - torch.block_diag(q, eye(5))).abs().max() < 1e-13
    assert (nearest_rotation(torch.zeros(4, 4, dtype=torch.float64)) - eye(4)).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [(200, 12), (30, 25), (12, 200), (40, 3, 3, 3), (12, 30, 1, 1), (1, 20)])
def test_what_differs_by_a_rotation_is_turned_into_each_other(shape):
    a, shift = tensors(*shape, count=2)
    n = math.prod(shape[1:])
    q, generator = rotation(n, largest=1.0)
    flat = a.flatten(1)
    mean, moved = flat.mean(0), shift.flatten(1)[0]
    b = ((flat - mean) @ q + moved).reshape(shape)
    assert relative(apply(Rotate(), a, b, dtype=torch.float64), b) < 1e-12
    if shape[0] > n:  # else there are rotations that turn less and do the same
        half = (flat - mean) @ torch.linalg.matrix_exp(0.5 * generator) + (mean + moved) / 2
        assert relative(apply(Rotate(alignment=0.5), a, b, dtype=torch.float64).flatten(1), half) < 1e-11


@pytest.mark.parametrize("shape", [(60, 12), (12, 60), (8, 7)])
def test_the_shape_of_a_is_kept_while_it_turns(shape):
    a, b = tensors(*shape, count=2)
    for alignment in (0.3, 1.0):
        result = apply(Rotate(alignment=alignment), a, b, dtype=torch.float64)
        x, y = a - a.mean(0), result - result.mean(0)
        assert (x @ x.T - y @ y.T).abs().max() < 1e-12 * (x @ x.T).abs().max()
        assert relative(result.mean(0), torch.lerp(a.mean(0), b.mean(0), alignment)) < 1e-12


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
def test_it_gets_as_near_to_b_as_a_rotation_can(shape):
    a, b = tensors(*shape, count=2)
    result = apply(Rotate(), a, b, dtype=torch.float64)
    x, y = a - a.mean(0), b - b.mean(0)
    if shape[0] < shape[1]:  # seen in the subspace that the points span
        frame = torch.linalg.qr(torch.cat([x, y]).T).Q
        x, y = x @ frame, y @ frame
    products = torch.linalg.svdvals(x.T @ y)
    best = x.norm() ** 2 + y.norm() ** 2 - 2 * products.sum()
    assert ((result - b).norm() ** 2 - best).item() < 4 * products.min().item() + 1e-12
    other, _ = rotation(x.shape[1], seed=5, largest=0.1)
    assert ((x @ nearest_rotation(x.T @ y) @ other) - y).norm() > ((x @ nearest_rotation(x.T @ y)) - y).norm()


@pytest.mark.parametrize("shape", [(60, 12), (12, 60), (40, 3, 3, 3)])
def test_the_remainder_goes_to_b_on_its_own(shape):
    a, b = tensors(*shape, count=2)
    assert relative(apply(Rotate(alignment=0.999999999, t=1.0), a, b, dtype=torch.float64), b) < 1e-8
    assert (Rotate(alignment=0.0, t=0.0).unchanged(), Rotate(alignment=1.0, t=1.0).unchanged()) == (0, 1)
    assert Rotate().unchanged() is None
    near = apply(Rotate(alignment=1e-9, t=0.0), a, b, dtype=torch.float64)
    assert relative(near, a) < 1e-8


def test_kernels_are_turned_in_the_space_of_their_pixels():
    a, b = tensors(6, 5, 3, 3, count=2)
    for t in (0.0, 0.4):
        kernels = apply(Rotate(alignment=0.7, t=t, rows="kernels"), a, b, dtype=torch.float64)
        matrices = apply(Rotate(alignment=0.7, t=t), a.reshape(30, 9), b.reshape(30, 9), dtype=torch.float64)
        assert relative(kernels.reshape(30, 9), matrices) < 1e-13
    x, y = tensors(6, 5, 1, 1, count=2)
    assert same_bits(apply(Rotate(rows="kernels"), x, y), apply(Rotate(), x, y))


@pytest.mark.parametrize("shape", [(), (9,)])
def test_vectors_are_lerped(shape):
    a, b = tensors(*shape, count=2)
    assert relative(apply(Rotate(alignment=0.9, t=0.3), a, b, dtype=torch.float64), 0.7 * a + 0.3 * b) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4), (4, 8), (8, 4, 1, 1), (8, 4, 3, 3), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(dtype, shape):
    a = tensors(*shape, count=1, dtype=dtype)[0]
    assert same_bits(apply(Rotate(alignment=0.7, t=0.2), a, a.clone(), dtype=dtype), a)


@pytest.mark.parametrize("which", [0, 1])
def test_a_zero_matrix_is_not_turned(which):
    given = [tensors(8, 4, count=1)[0], torch.zeros(8, 4, dtype=torch.float64)]
    a, b = given if which else given[::-1]
    result = apply(Rotate(alignment=0.5), a, b, dtype=torch.float64)
    assert relative(result, a - a.mean(0) + (a.mean(0) + b.mean(0)) / 2) < 1e-13


def test_runs_do_not_matter():
    a, b = tensors(20, 35, count=2, dtype=torch.float32)
    assert same_bits(apply(Rotate(), a, b), apply(Rotate(), a, b, runs=[1, 0, 299, 400]))


@pytest.mark.parametrize("alignment", [0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_sd_mecha_agrees_where_there_is_one_best_rotation(alignment, alpha):
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.svd")
    q, _ = rotation(9, largest=1.0)
    a, noise = tensors(60, 9, count=2)
    b = a @ q + 0.1 * noise
    for x, y in ((a, b), (a.reshape(12, 5, 3, 3), b.reshape(12, 5, 3, 3))):
        weight = torch.tensor(alpha, dtype=torch.float64)
        peer = module.rotate.__wrapped__({"w": x}, {"w": y}, alignment, weight, key="w", cache=None)
        method = Rotate(alignment=alignment, t=alpha, rows="kernels")
        assert relative(apply(method, x, y, dtype=torch.float64), peer) < 1e-7
