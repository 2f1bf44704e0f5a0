"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.methods.base import ParameterGroup
from tuner.optim.base import Optimizer, check_adam, torch_groups


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """torch's AdamW, in float32."""

    lr: float = 1e-4
    """The peak learning rate; 1e-4 suits a LoRA, 1e-5 full fine-tuning."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the gradient's first and second moments."""
    eps: float = 1e-8
    """Added to the second moment's root."""
    weight_decay: float = 0.01
    """Shrinks weights by lr * weight_decay each update."""

    def __post_init__(self) -> None:
        check_adam(self.lr, self.betas, self.eps, self.weight_decay)

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            torch_groups(groups, self.lr), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


SPEC: type[Optimizer] = AdamW
