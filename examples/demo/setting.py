"""What the demo's programs begin with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tuner.cli import recipe_module
from tuner.config.loader import load
from tuner.errors import DataError

HERE = Path(__file__).parent
FROM_THE_ROOT = "examples/demo"


def begin(overrides: Sequence[str]) -> Any:
    """The config in dreambooth.toml, with some values changed.

    Raises:
        DataError: the command was not typed in the project's folder, which the config's paths start from.
    """
    if not Path(FROM_THE_ROOT, "dreambooth.toml").is_file():
        raise DataError(f"{FROM_THE_ROOT}: not here; go to the project's folder and type: make demo")
    torch.set_num_threads(1)  # several that share a busy core wait for each other, up to ten times as long
    return load(recipe_module("dreambooth").Config, HERE / "dreambooth.toml", overrides)


def say(text: str) -> None:
    """What comes next."""
    print(f"\n== {text}", flush=True)
