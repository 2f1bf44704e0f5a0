"""Makes a LoRA smaller: of every layer the directions are kept that hold most of it.

What that loses is known exactly, and printed. `--check` works it out and writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from merge.lora import report
from merge.lora.ranks.base import Ranks
from merge.lora.resize import Resized, resize
from merge.lora.workshop import FileDtype, Workshop, dtype_of, rule_of
from tuner.config.command_line import run as run_command


@dataclass(frozen=True, kw_only=True)
class Config:
    """A LoRA and how much of it is kept."""

    lora: Path
    """A LoRA, LoHa or LoKr, in anybody's names."""
    output: Path
    """The safetensors file to write, in the same names."""
    rank: Ranks
    """How many directions of each layer are kept: a number, or a rule such as { type = "energy", share = 0.9 }."""
    base: Path | None = None
    """The checkpoint that it is for; needed for LoHa and LoKr."""
    alpha: float | None = None
    """For a file of peft's without its adapter_config.json."""
    dtype: FileDtype = "keep"
    """Of the factors in the file."""


def main(config: Config) -> None:
    """Decompose, choose, write and read back."""
    workshop = Workshop.open([config.lora], config.base, config.alpha)
    found = smaller(config, workshop)
    file = workshop.save(config.output, found.adapters, dtype=config.dtype)
    print(report.lost(found.parts, found.error))
    print(report.saved(file))


def check(config: Config) -> None:
    """Say what would be lost."""
    found = smaller(config, Workshop.open([config.lora], config.base, config.alpha))
    print(report.lost(found.parts, found.error))


def smaller(config: Config, workshop: Workshop) -> Resized:
    """The LoRA with fewer directions."""
    (lora,) = workshop.loras
    return resize(lora, rule_of(config.rank), dtype=dtype_of(lora, config.dtype), shapes=workshop.shapes)


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
