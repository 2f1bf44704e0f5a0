import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss

from merge.methods.posthoc_ema import PosthocEma, inner, power, shares
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random
from tuner.errors import ConfigError

KEPT = tuple((step, width) for step in range(1000, 9000, 1000) for width in (0.05, 0.10))
"""Snapshots as the paper keeps them: two widths, at intervals."""


def profile(step, sigma_rel, at):
    """How an average of this width, taken at `step`, weighs the network of the steps `at`."""
    gamma = power(sigma_rel)
    return np.where(at <= step, (gamma + 1) * at**gamma / step ** (gamma + 1), 0)


def method(sigma_rel, step=None, normalize=True, kept=KEPT):
    steps, widths = zip(*kept, strict=True)
    return PosthocEma(
        snapshot_steps=steps, snapshot_sigma_rel=widths, sigma_rel=sigma_rel, step=step, normalize=normalize
    )


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.15, 0.28])
def test_the_power_gives_the_width(sigma_rel):
    gamma = power(sigma_rel)
    nodes, weights = leggauss(200)
    at, weights = (nodes + 1) / 2, weights / 2
    p = profile(1, sigma_rel, at)
    mean = (weights * p * at).sum()
    assert (weights * p).sum() == pytest.approx(1)
    assert np.sqrt((weights * p * (at - mean) ** 2).sum()) == pytest.approx(sigma_rel)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2)


def test_powers_are_those_of_the_paper():
    assert power(0.05) == pytest.approx(16.97, abs=0.01) and power(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize(("p", "q"), [((3, 2.0), (5, 7.0)), ((5, 2.0), (3, 7.0)), ((4, 1.5), (4, 1.5))])
def test_inner_products_are_integrals(p, q):
    nodes, weights = leggauss(100)
    at, weights = (nodes + 1) / 2 * min(p[0], q[0]), weights / 2 * min(p[0], q[0])
    first, second = ((gamma + 1) * at**gamma / step ** (gamma + 1) for step, gamma in (p, q))
    assert inner(p, q) == pytest.approx((weights * first * second).sum())
    assert inner(p, q) == inner(q, p)


def training(steps=8000, numbers=20):
    """A run's weights at every step: a path that wanders."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, numbers, generator=generator, dtype=torch.float64).cumsum(0) / 100


def averaged(path, step, sigma_rel):
    """The average of a path, as it is kept during training: each step takes a share of the newest."""
    gamma = power(sigma_rel)
    average = torch.zeros_like(path[0])
    for t in range(1, step + 1):
        average = torch.lerp(path[t - 1], average, (1 - 1 / t) ** (gamma + 1))
    return average


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.07, None), (0.09, 5000), (0.12, None)])
def test_an_average_that_was_not_kept_is_rebuilt_from_those_that_were(sigma_rel, step):
    path = training()
    snapshots = [averaged(path, at, width) for at, width in KEPT]
    wanted = averaged(path, step or 8000, sigma_rel)
    spread = (averaged(path, step or 8000, 0.05) - averaged(path, step or 8000, 0.10)).norm()

    def error(normalize):
        return (apply(method(sigma_rel, step, normalize), *snapshots, dtype=torch.float64) - wanted).norm() / spread

    assert error(True) < error(False) < 0.03
    assert error(True) < 0.015


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_no_other_shares_come_nearer_to_the_wanted_profile(sigma_rel):
    at = np.arange(0.05, 8000, 0.1)
    columns = np.stack([profile(*snapshot, at) for snapshot in KEPT], 1)
    wanted = profile(8000, sigma_rel, at)

    def distance(x):
        return ((columns @ x - wanted) ** 2).sum()

    free = np.array(shares(KEPT, (8000, sigma_rel), False))
    bound = np.array(shares(KEPT, (8000, sigma_rel), True))
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = 1e-3 * rng.normal(size=len(KEPT))
        assert distance(free + step) > distance(free)
        assert distance(bound + step - step.mean()) > distance(bound)
    assert distance(bound) >= distance(free) - 1e-12


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_shares_add_up_to_1_unless_the_papers_are_wanted(sigma_rel):
    assert sum(shares(KEPT, (8000, sigma_rel), True)) == pytest.approx(1, abs=1e-12)
    free = sum(shares(KEPT, (8000, sigma_rel), False))
    assert free == pytest.approx(1, abs=0.05) and abs(free - 1) > 1e-9


def test_the_unit_of_steps_does_not_matter():
    scaled = tuple((step * 2048, width) for step, width in KEPT)
    assert shares(scaled, (8000 * 2048, 0.07), True) == pytest.approx(shares(KEPT, (8000, 0.07), True), rel=1e-6)


def test_an_average_that_was_kept_is_that_one():
    tensors = random(6, 5, inputs=len(KEPT))
    assert same_bits(apply(method(0.05), *tensors), tensors[-2])
    assert same_bits(apply(method(0.10, 3000), *tensors), tensors[5])


def test_one_width_may_stand_for_all():
    steps = (100, 200, 300)
    one = PosthocEma(snapshot_steps=steps, snapshot_sigma_rel=(0.1,), sigma_rel=0.12)
    each = PosthocEma(snapshot_steps=steps, snapshot_sigma_rel=(0.1, 0.1, 0.1), sigma_rel=0.12)
    tensors = random(6, 5)
    assert same_bits(apply(one, *tensors), apply(each, *tensors))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshot_steps": ()}, "snapshot_steps must be given"),
        ({"snapshot_steps": (0, 5)}, "snapshot_steps must be given, and be 1 or more"),
        ({"snapshot_steps": (5, 5)}, "snapshot_steps must not name an average of one width at one step twice"),
        (
            {"snapshot_sigma_rel": (0.1, 0.1, 0.1)},
            "snapshot_sigma_rel must be one number, or one for each of 2 steps, got 3",
        ),
        ({"snapshot_sigma_rel": (0.3,)}, "snapshot_sigma_rel must be from 0.001 to 0.288, got 0.3"),
        ({"sigma_rel": 0.0}, "sigma_rel must be from 0.001 to 0.288, got 0.0"),
        ({"step": 0}, "step must be 1 or more"),
    ],
)
def test_what_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PosthocEma(**{"snapshot_steps": (5, 10), "snapshot_sigma_rel": (0.1,), "sigma_rel": 0.1} | settings)


def test_there_is_a_step_for_each_input():
    with pytest.raises(ConfigError, match="snapshot_steps: 16 of them for 3 inputs; give one for each"):
        apply(method(0.07), *random(5))
