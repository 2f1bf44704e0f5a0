"""Trains a LoRA, or an adapter of another kind, on captioned pictures."""

from dataclasses import dataclass, field

from tuner.config.command_line import run as run_command
from tuner.data.sources.base import AnySource
from tuner.methods.base import AnyAdapter
from tuner.methods.lora import Lora
from tuner.training.recipe import Training, refuse_empty, train
from tuner.training.recipe import check as check_training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """A LoRA, or another adapter."""

    data: tuple[AnySource, ...]
    """Where the pictures come from."""
    method: AnyAdapter = field(default_factory=Lora)
    """What learns: a LoRA unless `type` says otherwise."""
    trigger: str | None = None
    """The words that call what was learned, for the model card."""


def main(config: Config) -> None:
    """Train, and write what was learned for every program."""
    refuse_empty(config.data)
    train(config, config.data, config.method, config.trigger)


def check(config: Config) -> None:
    """Say what a run would do."""
    refuse_empty(config.data)
    check_training(config, config.data, config.method)


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init lora` writes uncommented."""
    return {
        "run": {"output": "runs/lora", "name": "my-lora", "epochs": 20, "batch_size": 4},
        "model": {"base": base} if base else {},
        "data": [{"type": "folder", **({"path": data} if data else {})}],
        "captions": {"dropout": 0.1},
        "method": {"type": "lora", "rank": 16},
        "optimizer": {"type": "adamw", "lr": 1e-4},
        "learning_rate": {"type": "cosine", "warmup": 20},
    }


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
