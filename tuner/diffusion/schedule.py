"""How much signal and how much noise there is at time `t`: x_t = alpha(t) x_0 + sigma(t) noise.

Shapes: B = batch; every function takes and returns `[B]`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """Signal and noise levels over time."""

    @property
    def steps(self) -> int:
        """Times lie in [0, steps]: integers below `steps` where the schedule is discrete."""
        ...

    def time_at(self, share: Tensor) -> Tensor:
        """The time at a share, in [0, 1], of the way from no noise to nothing but noise."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at each time of `t`, float32."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1, as in DDPM (Ho et al. 2020, arXiv:2006.11239)."""

    alphas_cumprod: Tensor
    """`[steps]` float32: alpha squared at each time."""

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def time_at(self, share: Tensor) -> Tensor:
        return (share * self.steps).long().clamp(0, self.steps - 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_squared = self.alphas_cumprod.to(t.device)[t].float()
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - s) x_0 + s noise on straight lines, as in rectified flow (Liu et al. 2022, arXiv:2209.03003).

    The noise level s is the time over `steps`, and continuous (Esser et al. 2024, arXiv:2403.03206).
    """

    steps: int = 1000

    def time_at(self, share: Tensor) -> Tensor:
        return (share * self.steps).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float() / self.steps
        return 1 - sigma, sigma


def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> VariancePreserving:
    """The schedule Stable Diffusion 1, 2 and XL were trained with (Rombach et al. 2022, arXiv:2112.10752)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return VariancePreserving((1 - betas).cumprod(0).float())


def rescale_zero_terminal_snr(schedule: VariancePreserving) -> VariancePreserving:
    """The schedule moved and stretched so that its last time has no signal at all (Lin et al. 2023, arXiv:2305.08891).

    What is stretched is alpha: the first time keeps its own, the last one has 0. Whatever depends on the levels has to
    be computed from the result. A prediction of the noise says nothing of x_0 at the last time, so it needs another.
    """
    alpha = schedule.alphas_cumprod.double().sqrt()
    first, last = alpha[0], alpha[-1]
    return VariancePreserving((((alpha - last) * first / (first - last)) ** 2).float())


def flow_share(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise level of `Flow` at which there is as much noise against signal."""
    return sigma / (alpha + sigma)
