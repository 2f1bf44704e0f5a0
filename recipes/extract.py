"""Makes a LoRA of what a fine-tuned checkpoint has that its base has not.

Of every layer as many directions are kept as `rank` says, and the error of each is known exactly. `--check` lists what
would be told of and what not, and reads no weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from merge.lora import report
from merge.lora.extract import Wanted, extract, foreseen
from merge.lora.network import Network
from merge.lora.ranks.base import Ranks
from merge.lora.save import save
from merge.lora.workshop import refuse_inputs, rule_of
from tuner.config.command_line import run as run_command
from tuner.weights.adapters.header import Header
from tuner.weights.layouts.modules import Dialect


@dataclass(frozen=True, kw_only=True)
class Config:
    """Two checkpoints and what to make of their difference."""

    base: Path
    """What the fine-tune began with: a diffusers folder or a single file."""
    tuned: Path
    """The fine-tune, of the same network."""
    output: Path
    """The safetensors file to write."""
    rank: Ranks = 32
    """How many directions of each layer are kept: a number, or a rule such as { type = "energy", share = 0.9 }."""
    dialect: Dialect = "kohya"
    """Whose names: kohya's, which most programs read; diffusers', which has one rank for all layers; or comfy's."""
    keep: tuple[str, ...] = ("*",)
    """Patterns of diffusers' tensor names with `*` and `?`, such as "unet.*"."""
    drop: tuple[str, ...] = ()
    """Patterns of names that are left out."""
    vectors: bool = True
    """Tell of norms and biases too, as whole differences."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the factors in the file."""
    seed: int = 0
    """Of the directions from which the largest are searched."""


def main(config: Config) -> None:
    """Subtract, decompose, choose, write and read back."""
    refuse_inputs(config.output, [config.base, config.tuned])
    base, tuned = Network.open(config.base), Network.open(config.tuned)
    with tqdm(total=len(base.store.metas), unit="tensor", leave=False, disable=None) as bar:
        found = extract(
            base.store, tuned.store, rule_of(config.rank), wanted(config), base.modules, lambda name: bar.update()
        )
    header = Header(
        name=config.output.stem,
        family=base.family,
        dialect=config.dialect,
        made_of=(config.tuned.stem, config.base.stem),
    )
    file = save(
        config.output,
        found.adapters,
        config.dialect,
        base.modules,
        wanted(config).dtype,
        lambda tensors: header.texts(found.adapters.changes.values(), tensors),
    )
    for line in (report.lost(found.parts, found.error), report.left_out(found.left_out), report.saved(file)):
        if line:
            print(line)


def check(config: Config) -> None:
    """Say what would be told of."""
    base, tuned = Network.open(config.base), Network.open(config.tuned)
    layers, vectors, left_out = foreseen(base.store, tuned.store, wanted(config), base.modules)
    print(f"{config.output} would tell of {layers} layers, and of {vectors} norms and biases, where they differ")
    if left_out:
        print(report.left_out(left_out).replace("changed tensors", "tensors"))


def wanted(config: Config) -> Wanted:
    """What goes into the file."""
    return Wanted(
        dialect=config.dialect,
        keep=config.keep,
        drop=config.drop,
        vectors=config.vectors,
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
