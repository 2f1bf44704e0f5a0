"""The learning rate over a run, as a pure function: nothing to step, save or restore."""

from typing import Annotated, Protocol

from tuner.plugins import Folder


class LearningRate(Protocol):
    """The share of the peak learning rate at each update."""

    def factor(self, update: int, updates: int) -> float:
        """The factor of update `update`, counted from 0, of a run of `updates`."""
        ...


AnyLearningRate = Annotated[LearningRate, Folder("tuner.optim.schedules")]


def warm(update: int, warmup: int) -> float:
    """Linear warm-up: the first of `warmup` updates has 1 / (warmup + 1) of the peak, the one after them all of it."""
    return min(1.0, (update + 1) / (warmup + 1))


def progress(update: int, updates: int, warmup: int) -> float:
    """How far past warm-up the run is: 0 at the first full update, 1 at what would be the update after the last."""
    return min(1.0, max(0.0, (update - warmup) / max(1, updates - warmup)))


def check_warmup(warmup: int) -> None:
    """Raises: ValueError: a negative warm-up."""
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")


def check_final(final: float) -> None:
    """Raises: ValueError: a final share outside [0, 1]."""
    if not 0 <= final <= 1:
        raise ValueError(f"final must lie in [0, 1], got {final}")
