"""Writes a LoRA in the names of other programs: kohya's, diffusers' or ComfyUI's.

Nothing is left out on the way: what the other names have no word for is an error, unless it is said to be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from merge.lora import report
from merge.lora.workshop import FileDtype, Workshop
from tuner.config.command_line import run as run_command
from tuner.errors import ConfigError
from tuner.weights.adapters.file import SHOWN, Adapters
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
    """Of the factors in the file. Where keeping it would round a number, that factor is float32."""
    drop: tuple[str, ...] = ()
    """Patterns of tensor names with `*` and `?` that are left out, such as "text_encoder_3.*"; others are refused."""


def main(config: Config) -> None:
    """Read, write and read back."""
    workshop = Workshop.open([config.lora], config.base, config.alpha)
    lora, dropped = without(workshop.loras[0], config.drop)
    if dropped:
        print(f"left out: {len(dropped)} tensors: {', '.join(dropped[:SHOWN])}{' …' if len(dropped) > SHOWN else ''}")
    print(report.saved(workshop.save(config.output, lora, config.dialect, config.dtype)))


def without(lora: Adapters, drop: Sequence[str]) -> tuple[Adapters, list[str]]:
    """The LoRA without the tensors that fit a pattern, and their names.

    Raises:
        ConfigError: a pattern that nothing fits, or all of them fit.
    """
    for pattern in drop:
        if not any(fnmatchcase(name, pattern) for name in lora.changes):
            raise ConfigError(f"drop: {pattern!r}: fits no tensor; they are called like {next(iter(lora.changes))!r}")
    dropped = [name for name in lora.changes if any(fnmatchcase(name, pattern) for pattern in drop)]
    kept = {name: change for name, change in lora.changes.items() if name not in dropped}
    if not kept:
        raise ConfigError("drop: nothing is left of the LoRA; choose narrower patterns")
    return replace(lora, changes=kept), dropped


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main))
