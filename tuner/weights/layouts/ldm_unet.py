"""What a U-Net's modules are called in original single files, those of CompVis and Stability.

There a network is a flat list of steps, `input_blocks.4`, each a list of layers; diffusers names the levels and what is
on them, `down_blocks.1.resnets.0`. How many layers a level has, and whether it has attention, says which step is which.
Below a layer's name both agree, except in residual layers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


@dataclass(frozen=True)
class Level:
    """One resolution, on the way down or up."""

    layers: int
    attention: bool
    sampler: bool
    """Whether it ends with a change of resolution."""


@dataclass(frozen=True)
class Structure:
    """The levels of a U-Net in the order of computing."""

    down: tuple[Level, ...]
    up: tuple[Level, ...]

    def modules(self) -> dict[str, str]:
        """diffusers' modules, by the names that they have in single files."""
        names = {original: name for name, original in ENDS.items()}
        names |= _residual("middle_block.0", "mid_block.resnets.0") | _residual("middle_block.2", "mid_block.resnets.1")
        step = 1
        for number, level in enumerate(self.down):
            block = f"down_blocks.{number}"
            for layer in range(level.layers):
                names |= _layer(f"input_blocks.{step}", block, layer, level)
                step += 1
            if level.sampler:
                names[f"input_blocks.{step}.0.op"] = f"{block}.downsamplers.0.conv"
                step += 1
        step = 0
        for number, level in enumerate(self.up):
            block = f"up_blocks.{number}"
            for layer in range(level.layers):
                names |= _layer(f"output_blocks.{step}", block, layer, level)
                step += 1
            if level.sampler:
                place = 2 if level.attention else 1
                names[f"output_blocks.{step - 1}.{place}.conv"] = f"{block}.upsamplers.0.conv"
        return names


def _layer(step: str, block: str, layer: int, level: Level) -> dict[str, str]:
    attention = {f"{step}.1": f"{block}.attentions.{layer}"} if level.attention else {}
    return _residual(f"{step}.0", f"{block}.resnets.{layer}") | attention


def _residual(original: str, name: str) -> dict[str, str]:
    return {f"{original}.{theirs}": f"{name}.{ours}" for ours, theirs in RESIDUAL.items()}


def of_diffusers(names: Iterable[str]) -> Structure:
    """The structure of the U-Net whose tensors have these names, `down_blocks.…`, in diffusers."""
    found: dict[str, dict[int, dict[str, int]]] = {"down": {}, "up": {}}
    for name in names:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.", name):
            level = found[match[1]].setdefault(int(match[2]), {})
            kind = "samplers" if match[3].endswith("samplers") else match[3]
            level[kind] = max(level.get(kind, 0), int(match[4]) + 1)
    return Structure(
        *(tuple(_level(found[way], number) for number in range(_count(found[way]))) for way in ("down", "up"))
    )


def _count(levels: Mapping[int, object]) -> int:
    return max(levels, default=-1) + 1


def _level(levels: Mapping[int, Mapping[str, int]], number: int) -> Level:
    level = levels.get(number, {})
    return Level(level.get("resnets", 0), "attentions" in level, "samplers" in level)


def of_single_file(names: Iterable[str]) -> Structure:
    """The structure of the U-Net whose tensors have these names, `input_blocks.…`, in a single file."""
    steps: dict[str, dict[int, set[str]]] = {"input": {}, "output": {}}
    for name in names:
        if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(\w+)", name):
            kind = "sampler" if match[4] in ("op", "conv") else "attention" if match[3] == "1" else "residual"
            steps[match[1]].setdefault(int(match[2]), set()).add(kind)
    steps["input"].pop(0, None)  # the first convolution
    return Structure(_levels(steps["input"]), _levels(steps["output"]))


def _levels(steps: Mapping[int, set[str]]) -> tuple[Level, ...]:
    """A level ends with the step that has a sampler, which on the way down is a step of its own."""
    levels: list[Level] = []
    layers, attention = 0, False
    for number in sorted(steps):
        kinds = steps[number]
        layers += "residual" in kinds
        attention = attention or "attention" in kinds
        if "sampler" in kinds:
            levels.append(Level(layers, attention, sampler=True))
            layers, attention = 0, False
    return (*levels, Level(layers, attention, sampler=False)) if layers else tuple(levels)
