"""The training loop: global batches in, an updated `Trainable` out. It names no family, method or data set."""

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuner.diffusion.batch import GlobalBatch
from tuner.diffusion.objective import Loss
from tuner.errors import DivergedError
from tuner.methods.base import Trainable
from tuner.optim.schedules.base import LearningRate
from tuner.training.ema import Ema


class Model(Protocol):
    """All that the loop knows of a model: its networks, which may be wrapped for several processes."""

    networks: dict[str, nn.Module]


class Objective(Protocol):
    """What is minimized."""

    def loss(self, model: Any, batch: Any) -> Loss:
        """The loss of each example of a micro-batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update did."""

    update: int
    """Updates finished, this one included."""
    samples_seen: int
    """Samples seen, over all processes and since the run began."""
    loss: float
    """Weighted mean over the update's examples, on all processes."""
    grad_norm: float
    """Of all that learns together, before clipping."""
    lr: float
    """The first group's learning rate in this update."""
    skipped: bool
    """Whether the update was left out because float16 gradients overflowed; the loss scale has been lowered."""


class Watcher(Protocol):
    """Something that watches a run: a progress bar, metrics, previews, checkpoints. Called on every process."""

    def start(self, trainer: "Trainer") -> None:
        """Called once, before the first update."""
        ...

    def after_step(self, trainer: "Trainer", report: StepReport) -> None:
        """Called after each update."""
        ...

    def finish(self, trainer: "Trainer") -> None:
        """Called once, when the run is complete or was asked to stop."""
        ...


Stream = Callable[[int], Iterator[GlobalBatch]]
"""From the samples seen so far to this process's share of the next global batch, and of each one after it."""


@dataclass(kw_only=True)
class Trainer:
    """Runs an objective's gradient through an optimizer, and tells its watchers.

    One update is one global batch, however it is split: its loss is the weighted mean over all processes' examples.
    """

    accelerator: Accelerator
    model: Model
    trainable: Trainable
    objective: Objective
    stream: Stream
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    batch_size: int
    """The global batch: examples an update, over all processes."""
    samples: int
    """How many samples the whole run sees; the last update may go past it by less than a batch."""
    clip_norm: float | None = 1.0
    ema: Ema | None = None
    watchers: Sequence[Watcher] = ()
    stop_asked: Callable[[], bool] = lambda: False
    """Whether this process was asked to stop; one is enough to stop all, after the update at hand."""
    name_of: Callable[[int], str] = str
    """What a person calls a sample: its file."""
    samples_seen: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)
    ended: str | None = field(default=None, init=False)
    """Why the run is complete before it has seen all its samples."""
    best: Callable[[], Mapping[str, Tensor]] | None = field(default=None, init=False)
    """Weights to be published instead of the last ones."""
    best_at: int | None = field(default=None, init=False)
    """The samples seen when they were the run's."""

    def __post_init__(self) -> None:
        learning = {id(p) for p in self.trainable.parameters().values()}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # of torch, about an option whose successor has no address yet
            for name, network in self.model.networks.items():
                if any(id(p) in learning for p in network.parameters()):
                    self.model.networks[name] = cast(nn.Module, self.accelerator.prepare_model(network))
        self.optimizer = cast(torch.optim.Optimizer, self.accelerator.prepare_optimizer(self.optimizer))
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self.ema is not None and not self.ema.average:
            self.ema.update(self.trainable.state())

    @property
    def update(self) -> int:
        """Updates finished."""
        return self.samples_seen // self.batch_size

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def complete(self) -> bool:
        """Whether the run has seen all its samples, or need not."""
        return self.samples_seen >= self.samples or self.ended is not None

    def end(self, reason: str) -> None:
        """Be complete after this update; every process has to call it at the same one."""
        self.ended = self.ended or reason

    def fit(self) -> None:
        """Train until all samples are seen, counting those a checkpoint restored, or until asked to stop.

        Raises:
            DivergedError: the loss or the gradient is not finite; nothing was updated with it.
        """
        for watcher in self.watchers:
            watcher.start(self)
        if not self.complete:
            for global_batch in self.stream(self.samples_seen):
                report = self.train_step(global_batch)
                for watcher in self.watchers:
                    watcher.after_step(self, report)
                if self.complete or self.stopped:
                    break
        for watcher in self.watchers:
            watcher.finish(self)

    def train_step(self, global_batch: GlobalBatch) -> StepReport:
        """One update: the gradient of the weighted mean loss over every example of every process."""
        world = self.accelerator.num_processes
        networks = [m for m in self.model.networks.values() if isinstance(m, nn.parallel.DistributedDataParallel)]
        total = torch.zeros((), device=self.accelerator.device)
        losses: list[Tensor] = []
        for index, batch in enumerate(global_batch.micro_batches):
            with ExitStack() as stack:
                if index < len(global_batch.micro_batches) - 1:  # gradients meet once, in the last backward
                    for network in networks:
                        stack.enter_context(network.no_sync())
                self.trainable.at(batch.positions)
                with self.accelerator.autocast():
                    per_example = self.objective.loss(self.model, batch).weighted
                loss = (per_example * batch.weight).sum() / global_batch.weight
                self.accelerator.backward(loss * world)  # processes' gradients are averaged, and we want their sum
            total += loss.detach()
            losses.append(per_example.detach())
        self.trainable.at(())

        mean_loss, stop = self._sum(total, float(self.stop_asked()))
        self.stopped = self.stopped or stop > 0
        lr = self._set_learning_rate()
        self._let_rest()
        grad_norm = self._clip()
        self._refuse_non_finite(mean_loss, grad_norm, global_batch, losses)
        self.optimizer.step()  # with float16, a loss scale that was too large makes it leave this update out
        skipped = self.accelerator.scaler is not None and not math.isfinite(grad_norm)
        self.optimizer.zero_grad()
        if self.ema is not None and not skipped:
            self.ema.update(self.trainable.state())
        self.samples_seen += global_batch.samples
        return StepReport(
            update=self.update,
            samples_seen=self.samples_seen,
            loss=mean_loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=skipped,
        )

    def _sum(self, loss: Tensor, stop: float) -> tuple[float, float]:
        """Both summed over processes, in one exchange."""
        mine = torch.stack([loss.double() if loss.device.type == "cpu" else loss, torch.tensor(stop).to(loss)])
        summed = cast(Tensor, self.accelerator.reduce(mine, "sum"))
        return float(summed[0]), float(summed[1])

    def _set_learning_rate(self) -> float:
        factor = self.learning_rate.factor(self.update, self.updates)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def _let_rest(self) -> None:
        """What has learned as long as it was to has no gradient any more, and no optimizer moves what has none."""
        for group in self.trainable.groups:
            if group.until < 1 and self.update >= group.until * self.updates:
                for p in group.parameters.values():
                    p.grad = None

    def _clip(self) -> float:
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = self.accelerator.clip_grad_norm_(list(self.trainable.parameters().values()), limit)
        return float(cast(Tensor, norm))

    def _refuse_non_finite(
        self, loss: float, grad_norm: float, global_batch: GlobalBatch, losses: Sequence[Tensor]
    ) -> None:
        scaler = self.accelerator.scaler
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        if math.isfinite(loss) and scaler is not None and scaler.get_scale() > 1:
            return  # float16: an overflow is the loss scale's, which then falls until it is none
        what = "loss" if not math.isfinite(loss) else "gradient"
        samples = [at.sample for batch in global_batch.micro_batches for at in batch.positions]
        finite = torch.cat(list(losses)).isfinite().tolist()
        culprits = [sample for sample, good in zip(samples, finite, strict=True) if not good]
        names = list(dict.fromkeys(self.name_of(sample) for sample in culprits or samples))
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise DivergedError(
            f"update {self.update + 1}: the {what} is not finite (loss {loss}, gradient norm {grad_norm}), "
            f"{'of' if culprits else 'among'} its pictures {', '.join(names[:8])}{more}; lower optimizer.lr or use "
            "precision = 'bf16'; the last checkpoint is unharmed"
        )

    @contextmanager
    def published_weights(self) -> Generator[None]:
        """For the time of a `with`, the weights that would be published: the average where there is one."""
        if self.ema is None:
            yield
            return
        latest = {name: tensor.clone() for name, tensor in self.trainable.state().items()}
        self.trainable.load_state(self.ema.average)
        try:
            yield
        finally:
            self.trainable.load_state(latest)

    @contextmanager
    def final_weights(self) -> Generator[None]:
        """For the time of a `with`, the weights to be published: the best ones where they were kept."""
        with self.published_weights():
            if self.best is not None:
                latest = {name: tensor.clone() for name, tensor in self.trainable.state().items()}
                self.trainable.load_state(self.best())
                try:
                    yield
                finally:
                    self.trainable.load_state(latest)
            else:
                yield

    def load_state(
        self,
        samples_seen: int,
        trainable: Mapping[str, Tensor],
        optimizer: dict[str, Any] | None,
        average: Mapping[str, Tensor] | None = None,
        averaged: int = 0,
    ) -> None:
        """Go on from a checkpoint.

        The optimizer's settings stay those of this run; what it remembers is taken over, or begins anew where None.
        So does the average of the weights, which is of `averaged` updates.
        """
        self.samples_seen = samples_seen
        self.trainable.load_state(trainable)
        if optimizer is not None:
            own = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**optimizer, "param_groups": own})
        if self.ema is not None:
            saved = trainable if average is None else average
            self.ema.average = {
                name: saved[name].to(latest.device, torch.float32, copy=True)
                for name, latest in self.trainable.state().items()
            }
            self.ema.updates = averaged
