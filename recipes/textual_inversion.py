"""Teaches the base new words from captioned pictures, alone or with a LoRA beside them (pivotal tuning)."""

from dataclasses import dataclass, field

from tuner.config.command_line import run as run_command
from tuner.data.sources.base import AnySource
from tuner.methods.textual_inversion import TextualInversion
from tuner.optim.adamw import AdamW
from tuner.optim.base import AnyOptimizer
from tuner.training.recipe import Training, refuse_empty, train
from tuner.training.recipe import check as check_training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Textual inversion, and pivotal tuning."""

    data: tuple[AnySource, ...]
    """Where the pictures come from; their captions hold the new words."""
    method: TextualInversion
    """The new words, and what else learns."""
    optimizer: AnyOptimizer = field(default_factory=lambda: AdamW(lr=1e-3))
    """How gradients become updates."""
    trigger: str | None = None
    """The words that call what was learned, for the model card; the new ones where left out."""


def main(config: Config) -> None:
    """Train, and write each word for every program."""
    refuse_empty(config.data)
    train(config, config.data, config.method, config.trigger or " ".join(config.method.tokens))


def check(config: Config) -> None:
    """Say what a run would do."""
    refuse_empty(config.data)
    check_training(config, config.data, config.method)


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init textual_inversion` writes uncommented."""
    source = {"type": "folder", **({"path": data} if data else {}), "prompt": "a photo of <my-cat>"}
    return {
        "run": {"output": "runs/words", "name": "my-words", "samples": 3000, "batch_size": 4},
        "model": {"base": base} if base else {},
        "data": [source],
        "method": {"tokens": {"<my-cat>": {"init": "cat", "vectors": 2}}},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
