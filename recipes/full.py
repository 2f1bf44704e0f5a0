"""Full fine-tuning of a base model on captioned pictures."""

from dataclasses import dataclass, field

from tuner.config.command_line import run as run_command
from tuner.data.captions import Captions
from tuner.data.images import Pictures
from tuner.data.sources.base import AnySource
from tuner.diffusion.objective import Objective
from tuner.families.source import BaseModel
from tuner.methods.full import Full
from tuner.optim.adamw import AdamW
from tuner.optim.base import AnyOptimizer
from tuner.optim.schedules.base import AnyLearningRate
from tuner.optim.schedules.constant import Constant
from tuner.training.observers.base import AnyObserver
from tuner.training.run import Run, RunConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Full fine-tuning."""

    run: RunConfig
    model: BaseModel
    data: tuple[AnySource, ...]
    """Where the pictures come from."""
    pictures: Pictures = field(default_factory=Pictures)
    captions: Captions = field(default_factory=Captions)
    method: Full = field(default_factory=Full)
    objective: Objective = field(default_factory=Objective)
    optimizer: AnyOptimizer = field(default_factory=lambda: AdamW(lr=1e-5))
    """How gradients become updates."""
    learning_rate: AnyLearningRate = field(default_factory=Constant)
    """The learning rate over the run, as a share of the optimizer's."""
    observers: tuple[AnyObserver, ...] = ()
    """What else watches the run."""


def main(config: Config) -> None:
    """Train, and write a diffusers folder."""
    with Run.start(config.run, config) as run:
        model = config.model.open(run.device)
        examples = run.examples(config.data, model)
        encoded = run.encode(model, examples, config.pictures, config.captions)
        trainable = config.method.attach(model, config.run.seed)
        model.cast_frozen(run.frozen_dtype)
        stream = run.stream(model, encoded, config.captions, trainable)
        trainer = run.trainer(
            model, trainable, config.objective, stream, config.optimizer, config.learning_rate, config.observers
        )
        trainer.fit()
        run.leave_if_stopped(trainer)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main))
