"""Post-hoc EMA: an average of a run's weights of any width, from snapshots (Karras et al. 2024, arXiv:2312.02696)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods._sums import add_up
from merge.methods.base import Elementwise, Space
from tuner.errors import ConfigError

NARROWEST, WIDEST = 0.001, 0.288
"""What sigma_rel may be: that of the plain mean over a run is 0.2887, and of power functions that grow, less."""


@dataclass(frozen=True, kw_only=True)
class PosthocEma(Elementwise):
    """sum_i x_i W_i, where the W_i are averages over one run, x chosen so that the sum is nearly another such average.

    Averaging by a power function of time weighs the network of step tau by p(tau) = (gamma + 1) tau^gamma / T^(gamma+1)
    up to the step T at which it is taken. Its width is told by sigma_rel, the standard deviation of p over T:
    sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)). The x_i minimise the integral of (sum_i x_i p_i - p)², with p
    that of the wanted average (section 3.2). One that is among the inputs is given as it is, bit for bit.

    What comes out well are widths between those of the snapshots, at steps of snapshots; the paper keeps 0.05 and 0.10
    every few thousand steps. Narrower ones do not: the x_i are large and alternate in sign, and blow up the rounding of
    the inputs.
    """

    snapshot_steps: tuple[int, ...]
    """The step T_i of each input, from 1; in any unit."""
    snapshot_sigma_rel: tuple[float, ...]
    """The width of each input: one for each, or one for all; from 0.001 to 0.288."""
    sigma_rel: Number
    """The wanted width; in the same range."""
    step: int | None = None
    """The step T of the wanted average; where left out, the last of `snapshot_steps`."""
    normalize: bool = True
    """Whether the x_i are the best of those that add up to 1, which comes nearer where weights keep away from 0. In the
    paper they add up to nearly 1 only; its networks do not mind what their weights are multiplied by."""

    takes = (Space.EITHER,)
    repeats = True
    gives = Space.EITHER
    temporaries = 0

    def __post_init__(self) -> None:
        steps, widths = self.snapshot_steps, self.snapshot_sigma_rel
        if not steps or min(steps) < 1:
            raise ValueError(f"snapshot_steps must be given, and be 1 or more, got {list(steps)}")
        if self.step is not None and self.step < 1:
            raise ValueError(f"step must be 1 or more, got {self.step}")
        if len(widths) not in (1, len(steps)):
            raise ValueError(
                f"snapshot_sigma_rel must be one number, or one for each of {len(steps)} steps, got {len(widths)}"
            )
        for number in widths:
            check_range("snapshot_sigma_rel", number, NARROWEST, WIDEST)
        check_range("sigma_rel", self.sigma_rel, NARROWEST, WIDEST)
        if len(set(self.snapshots)) < len(steps):
            raise ValueError(
                f"snapshot_steps must not name an average of one width at one step twice, got {list(steps)}"
            )

    @property
    def snapshots(self) -> tuple[tuple[int, float], ...]:
        """The step and width of each input."""
        steps, widths = self.snapshot_steps, self.snapshot_sigma_rel
        return tuple(zip(steps, widths * len(steps) if len(widths) == 1 else widths, strict=True))

    @property
    def wanted(self) -> tuple[int, float]:
        """The step and width of the result."""
        return self.step or max(self.snapshot_steps), fixed(self.sigma_rel)

    def unchanged(self) -> int | None:
        return self.snapshots.index(self.wanted) if self.wanted in self.snapshots else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        given = len(self.snapshot_steps)
        if len(inputs) != given:
            raise ConfigError(f"snapshot_steps: {given} of them for {len(inputs)} inputs; give one for each")
        add_up(inputs, shares(self.snapshots, self.wanted, self.normalize), out)


@cache
def shares(snapshots: tuple[tuple[int, float], ...], wanted: tuple[int, float], normalize: bool) -> tuple[float, ...]:
    """The x_i of averages, each given by its step and sigma_rel."""
    if wanted in snapshots:
        return tuple(float(snapshot == wanted) for snapshot in snapshots)
    profiles = [(step, power(sigma_rel)) for step, sigma_rel in snapshots]
    target = (wanted[0], power(wanted[1]))
    unit = max(step for step, _ in (*profiles, target))
    matrix = np.array([[unit * inner(p, q) for q in profiles] for p in profiles])
    right = np.array([unit * inner(p, target) for p in profiles])
    if normalize:  # by a Lagrange multiplier
        ones = np.ones((len(profiles), 1))
        matrix = np.block([[matrix, ones], [ones.T, np.zeros((1, 1))]])
        right = np.append(right, 1)
    solution = np.linalg.solve(matrix, right)
    return tuple(solution[: len(profiles)].tolist())


def power(sigma_rel: float) -> float:
    """The gamma of `sigma_rel`: the positive root of gamma³ + 7 gamma² + (16 - s) gamma + 12 - s, s = sigma_rel^-2."""
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def inner(p: tuple[int, float], q: tuple[int, float]) -> float:
    """The integral of the product of two profiles, each given by its step and gamma."""
    (early, gamma), (late, other) = sorted((p, q))
    return (gamma + 1) * (other + 1) / (gamma + other + 1) * (early / late) ** other / late


SPEC: type[Elementwise] = PosthocEma
