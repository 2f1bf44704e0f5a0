"""The peak learning rate throughout, after warm-up."""

from dataclasses import dataclass

from tuner.optim.schedules.base import LearningRate, check_warmup, warm


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Constant after a linear warm-up."""

    warmup: int = 0
    """Updates over which the rate rises to its peak."""

    def __post_init__(self) -> None:
        check_warmup(self.warmup)

    def factor(self, update: int, updates: int) -> float:
        return warm(update, self.warmup)


SPEC: type[LearningRate] = Constant
