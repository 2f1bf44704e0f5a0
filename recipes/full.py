"""Fine-tunes every weight of the denoiser, and of the text encoder where asked, on captioned pictures."""

from dataclasses import dataclass, field

from tuner.config.command_line import run as run_command
from tuner.data.sources.base import AnySource
from tuner.methods.full import Full
from tuner.optim.adamw import AdamW
from tuner.optim.base import AnyOptimizer
from tuner.training.recipe import Training, refuse_empty, train
from tuner.training.recipe import check as check_training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Full fine-tuning."""

    data: tuple[AnySource, ...]
    """Where the pictures come from."""
    method: Full = field(default_factory=Full)
    """What learns."""
    optimizer: AnyOptimizer = field(default_factory=lambda: AdamW(lr=1e-5))
    """How gradients become updates."""


def main(config: Config) -> None:
    """Train, and write a diffusers folder."""
    refuse_empty(config.data)
    train(config, config.data, config.method, None)


def check(config: Config) -> None:
    """Say what a run would do."""
    refuse_empty(config.data)
    check_training(config, config.data, config.method)


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init full` writes uncommented."""
    return {
        "run": {"output": "runs/full", "name": "my-model", "epochs": 10, "batch_size": 16, "ema": 0.999},
        "model": {"base": base} if base else {},
        "data": [{"type": "folder", **({"path": data} if data else {})}],
        "captions": {"dropout": 0.1},
        "optimizer": {"type": "adamw", "lr": 1e-5},
        "learning_rate": {"type": "cosine", "warmup": 100},
    }


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
