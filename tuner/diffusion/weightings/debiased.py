"""Debiased estimation (Yu et al. 2023, arXiv:2310.08442): high noise levels count for more than in the plain loss."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class Debiased:
    """1 / sqrt(SNR) on errors in the noise.

    Trainers agree on it for epsilon-prediction, and have three formulas for v-prediction; sd-scripts' one is `Clean`.
    """

    convention: Literal["paper", "output"] = "paper"
    """What other predictions get. `paper`: the same loss, whatever is predicted: sqrt(SNR) on errors in x_0. `output`:
    errors of the output times what they are in x_0, which is 1 / sqrt(SNR + 1) for v-prediction, as in OneTrainer."""

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        return alpha / sigma if self.convention == "paper" else 1 / gain


SPEC: type[Weighting] = Debiased
