"""What an autoencoder's modules are called in original single files.

The decoder's levels are counted from the other side: `up.0` is the last one that is computed. The four layers of the
attention in the middle are convolutions of kernel 1 there, and linear layers in diffusers.
"""

import re
from collections.abc import Iterable

RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LINEAR = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
"""Tensors of the layers that are convolutions in single files."""


def modules(levels: int, layers: int) -> dict[str, str]:
    """diffusers' modules, by the names that they have in single files.

    Args:
        levels: how many resolutions there are.
        layers: residual layers on each of the encoder's; the decoder's have one more.
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        for part in ("conv_in", "conv_out"):
            names[f"{side}.{part}"] = f"{side}.{part}"
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for index in (0, 1):
            names |= _residual(f"{side}.mid.block_{index + 1}", f"{side}.mid_block.resnets.{index}")
        for ours, theirs in ATTENTION.items():
            names[f"{side}.mid.attn_1.{theirs}"] = f"{side}.mid_block.attentions.0.{ours}"
    for level in range(levels):
        up = levels - 1 - level
        for layer in range(layers):
            names |= _residual(f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}")
        for layer in range(layers + 1):
            names |= _residual(f"decoder.up.{up}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}")
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{up}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
    return names


def _residual(original: str, name: str) -> dict[str, str]:
    return {f"{original}.{theirs}": f"{name}.{ours}" for ours, theirs in RESIDUAL.items()}


def size(names: Iterable[str]) -> tuple[int, int]:
    """Levels and layers of the autoencoder whose tensors have these names, in either layout."""
    places = [re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.", name) for name in names]
    found = [(int(match[1]), int(match[2])) for match in places if match]
    return (max(found)[0] + 1, max(layer for _, layer in found) + 1) if found else (0, 0)
