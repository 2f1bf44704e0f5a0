"""Writes a LoRA in the names of other programs: kohya's, diffusers' or ComfyUI's.

Nothing is left out on the way: what the other names have no word for is an error.
"""

from dataclasses import dataclass
from pathlib import Path

from merge.lora import report
from merge.lora.workshop import FileDtype, Workshop
from tuner.config.command_line import run as run_command
from tuner.weights.layouts.modules import Dialect


@dataclass(frozen=True, kw_only=True)
class Config:
    """A LoRA and in whose names it is wanted."""

    lora: Path
    """In anybody's names."""
    output: Path
    """The safetensors file to write."""
    dialect: Dialect
    """Whose names are written."""
    base: Path | None = None
    """The checkpoint that it is for: from kohya's and comfy's names its modules cannot be told without it."""
    alpha: float | None = None
    """For a file of peft's without its adapter_config.json."""
    dtype: FileDtype = "keep"
    """Of the factors in the file."""


def main(config: Config) -> None:
    """Read, write and read back."""
    workshop = Workshop.open([config.lora], config.base, config.alpha)
    (lora,) = workshop.loras
    print(report.saved(workshop.save(config.output, lora, config.dialect, config.dtype)))


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main))
