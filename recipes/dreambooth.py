"""Teaches the base one subject from a few pictures of it (DreamBooth), into a LoRA or into all its weights."""

from dataclasses import dataclass, field

from tuner.config.command_line import run as run_command
from tuner.data.sources.dreambooth import Dreambooth
from tuner.methods.base import AnyMethod
from tuner.methods.lora import Lora
from tuner.training.recipe import Training, train
from tuner.training.recipe import check as check_training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """DreamBooth."""

    data: Dreambooth
    """The subject's pictures, and those of its class."""
    method: AnyMethod = field(default_factory=Lora)
    """What learns."""


def main(config: Config) -> None:
    """Train, and write what was learned."""
    train(config, [config.data], config.method, config.data.prompt)


def check(config: Config) -> None:
    """Say what a run would do."""
    check_training(config, [config.data], config.method)


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init dreambooth` writes uncommented."""
    return {
        "run": {"output": "runs/dreambooth", "name": "my-subject", "samples": 2000, "batch_size": 4},
        "model": {"base": base} if base else {},
        "data": {
            **({"subject": data} if data else {}),
            "prompt": "a photo of a sks dog",
            "class_folder": "class/dog",
            "class_prompt": "a photo of a dog",
        },
        "method": {"type": "lora", "rank": 16},
        "optimizer": {"type": "adamw", "lr": 1e-4},
    }


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
