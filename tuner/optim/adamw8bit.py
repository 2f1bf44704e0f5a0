"""AdamW with 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.errors import ConfigError
from tuner.methods.base import ParameterGroup
from tuner.optim.base import Optimizer, check_adam, torch_groups


@dataclass(frozen=True, kw_only=True)
class AdamW8bit:
    """AdamW whose moments take 2 bytes a weight instead of 8; tensors under 4096 elements stay in 32 bits."""

    lr: float = 1e-4
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the gradient's first and second moments."""
    eps: float = 1e-8
    """Added to the second moment's root."""
    weight_decay: float = 0.01
    """Shrinks weights by lr * weight_decay each update."""

    def __post_init__(self) -> None:
        check_adam(self.lr, self.betas, self.eps, self.weight_decay)

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        remedy = "pip install bitsandbytes, or set optimizer.type = 'adamw'"
        try:
            bitsandbytes = importlib.import_module("bitsandbytes")
        except ImportError as error:
            raise ConfigError(f"optimizer.type: 'adamw8bit' needs bitsandbytes ({error}); {remedy}") from error
        optimizer = bitsandbytes.optim.AdamW8bit(
            torch_groups(groups, self.lr), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        self._try_once(bitsandbytes, next(iter(groups[0].parameters.values())).device)
        return optimizer

    def _try_once(self, bitsandbytes: object, device: torch.device) -> None:
        """One step of a throw-away tensor, so that a machine that cannot says so now."""
        probe = torch.nn.Parameter(torch.ones(4096, device=device))
        probe.grad = torch.ones_like(probe)
        try:
            bitsandbytes.optim.AdamW8bit([probe], lr=1e-3).step()  # pyright: ignore[reportAttributeAccessIssue]
        except (RuntimeError, AttributeError, NotImplementedError, NameError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"optimizer.type: bitsandbytes cannot run 'adamw8bit' on {device.type} here ({reason}); "
                "set optimizer.type = 'adamw'"
            ) from error


SPEC: type[Optimizer] = AdamW8bit
