"""What watches a run beyond what every run has (progress, `metrics.jsonl`, checkpoints)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from accelerate import Accelerator

from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.example import Example
from tuner.diffusion.objective import Objective
from tuner.families.base import OpenedModel
from tuner.plugins import Folder
from tuner.training.metrics import Metrics
from tuner.training.trainer import Watcher


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an observer may look at."""

    folder: Path
    """The run's output folder."""
    accelerator: Accelerator
    model: OpenedModel
    encoded: Encoded
    held_out: Sequence[Example]
    """Pictures that the run does not train on, where a share of them was to be held out."""
    objective: Objective
    captions: Captions
    metrics: Metrics
    config: dict[str, Any]
    """The resolved config as plain values."""
    progress: Callable[[Sequence[str], str], Iterable[str]]
    say: Callable[[str], None]
    """Puts a line before the user, once, whatever process calls it."""


class Observer(Protocol):
    """A recipe's choice of what to watch."""

    def watch(self, scene: Scene) -> Watcher:
        """Begin to watch; called on every process after the model is ready.

        Raises:
            UserError: it cannot; the message says what is missing.
        """
        ...


AnyObserver = Annotated[Observer, Folder("tuner.training.observers")]
