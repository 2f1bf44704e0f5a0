"""Half a cosine from the peak down (Loshchilov and Hutter 2017, arXiv:1608.03983), after warm-up."""

from dataclasses import dataclass
from math import cos, pi

from tuner.optim.schedules.base import LearningRate, check_final, check_warmup, progress, warm


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Cosine decay after a linear warm-up."""

    warmup: int = 0
    """Updates over which the rate rises to its peak."""
    final: float = 0.0
    """The share of the peak that the rate falls to."""

    def __post_init__(self) -> None:
        check_warmup(self.warmup)
        check_final(self.final)

    def factor(self, update: int, updates: int) -> float:
        fall = (1 + cos(pi * progress(update, updates, self.warmup))) / 2
        return warm(update, self.warmup) * (self.final + (1 - self.final) * fall)


SPEC: type[LearningRate] = Cosine
