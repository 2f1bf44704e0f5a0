"""An optimizer as a config builds it."""

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import torch

from tuner.methods.base import ParameterGroup
from tuner.plugins import Folder


class Optimizer(Protocol):
    """A recipe's choice of how gradients become updates."""

    @property
    def lr(self) -> float:
        """The peak learning rate of groups without one of their own."""
        ...

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The optimizer over `groups`, one torch group each, in their order, at its peak learning rate.

        Raises:
            UserError: this machine cannot run it; the message says what can.
        """
        ...


AnyOptimizer = Annotated[Optimizer, Folder("tuner.optim")]


def torch_groups(groups: Sequence[ParameterGroup], lr: float) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them; those that do not decay have a weight decay of 0 of their own."""
    return [
        {
            "params": list(group.parameters.values()),
            "lr": group.peak(lr),
            "name": group.name,
            **({} if group.decays else {"weight_decay": 0.0}),
        }
        for group in groups
    ]


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """The ranges that every Adam needs.

    Raises:
        ValueError: a value outside its range.
    """
    if lr <= 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), got {list(betas)}")
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
