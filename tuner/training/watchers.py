"""What watches every run: the progress bar, the metrics file and the checkpoints."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from tuner.training.metrics import Metrics
from tuner.training.trainer import StepReport, Trainer


@dataclass
class Progress:
    """A bar with speed and time left, on the main process."""

    main: bool
    _bar: Any = None

    def start(self, trainer: Trainer) -> None:
        if self.main:
            seen = trainer.samples_seen
            self._bar = tqdm(total=trainer.samples, initial=seen, unit="img", desc="training", dynamic_ncols=True)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._bar is None:
            return
        self._bar.update(min(report.samples_seen, trainer.samples) - self._bar.n)
        self._bar.set_postfix(loss=f"{report.loss:.4f}", lr=f"{report.lr:.2e}", refresh=False)

    def finish(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, so that what is said next has one of its own."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class StepMetrics:
    """A line of `metrics.jsonl` an update."""

    metrics: Metrics
    _since: float = field(default_factory=time.monotonic)

    def start(self, trainer: Trainer) -> None:
        self._since = time.monotonic()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        now = time.monotonic()
        self.metrics.write(
            "update",
            report.samples_seen,
            update=report.update,
            loss=report.loss,
            grad_norm=report.grad_norm,
            lr=report.lr,
            skipped=report.skipped,
            seconds=round(now - self._since, 4),
        )
        self._since = now

    def finish(self, trainer: Trainer) -> None:
        pass


@dataclass
class Saving:
    """A checkpoint every so many samples, and at the end."""

    save: Callable[[Trainer], None]
    every: int | None
    _saved_at: int = -1

    def start(self, trainer: Trainer) -> None:
        self._saved_at = trainer.samples_seen  # nothing new to save yet

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.every and passed(self.every, report.samples_seen, trainer.batch_size):
            self._save(trainer)

    def finish(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._saved_at != trainer.samples_seen:
            self.save(trainer)
            self._saved_at = trainer.samples_seen


def passed(every: int, samples_seen: int, batch: int) -> bool:
    """Whether the last update of `batch` samples reached or passed a multiple of `every`."""
    return samples_seen // every > (samples_seen - batch) // every


def quiet(items: Sequence[str], what: str) -> Iterable[str]:
    """No progress shown."""
    return items


def shown(items: Sequence[str], what: str) -> Iterable[str]:
    """A progress bar over `items`, if there are any."""
    return tqdm(items, desc=what, dynamic_ncols=True) if items else items
