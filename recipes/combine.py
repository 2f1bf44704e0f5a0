"""Makes one LoRA of several: their weighted sum, exactly, or what a merge method makes of their differences.

`--check` works it out and writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from merge.lora import report
from merge.lora.combine import Combined, combine
from merge.lora.ranks.base import Ranks
from merge.lora.workshop import Workshop, rule_of
from merge.methods.base import AnyMergeMethod
from tuner.config.command_line import run as run_command
from tuner.weights.layouts.modules import Dialect


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One of them."""

    file: Path
    """In anybody's names; names of several kinds need a base."""
    weight: float = 1.0
    """What its difference is multiplied by, once; a negative one takes it away."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """LoRAs and how they become one."""

    loras: tuple[Lora, ...]
    """Those that are combined."""
    output: Path
    """The safetensors file to write."""
    method: AnyMergeMethod | None = None
    """What makes one difference of theirs, such as "ties"; they are added up where left out."""
    rank: Ranks | None = None
    """How many directions of each layer are kept, a number or a rule. All of a sum where left out: ranks add up."""
    base: Path | None = None
    """The checkpoint that they are for; needed for names of several kinds, and for LoHa and LoKr."""
    alpha: float | None = None
    """For files of peft's without their adapter_config.json."""
    dialect: Dialect | None = None
    """Whose names are written; those of the first LoRA where left out."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the factors in the file."""
    seed: int = 0
    """Of the directions from which the largest of what a method makes are searched."""


def main(config: Config) -> None:
    """Combine, write and read back."""
    workshop = Workshop.open([lora.file for lora in config.loras], config.base, config.alpha)
    found = combined(config, workshop)
    file = workshop.save(config.output, found.adapters, config.dialect, config.dtype)
    if found.parts:
        print(report.lost(found.parts, found.error))
    print(report.saved(file))


def check(config: Config) -> None:
    """Say what would be written."""
    found = combined(config, Workshop.open([lora.file for lora in config.loras], config.base, config.alpha))
    print(report.lost(found.parts, found.error) if found.parts else f"{len(found.adapters.changes)} tensors, exactly")


def combined(config: Config, workshop: Workshop) -> Combined:
    """The LoRAs as one."""
    return combine(
        workshop.loras,
        [lora.weight for lora in config.loras],
        method=config.method,
        rule=None if config.rank is None else rule_of(config.rank),
        dialect=config.dialect,
        dtype=getattr(torch, config.dtype),
        shapes=workshop.shapes,
        seed=config.seed,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
