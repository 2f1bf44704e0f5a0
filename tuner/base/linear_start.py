"""Where the base model's autoencoder starts from: exact averaging of colours, in the stock network's own weights.

From random weights a narrow autoencoder spends most of its training on learning to pass plain colours, which its group
norms hide from it. So the residual stream is set to carry them: the first three latents are the mean colour of their
pixels, the decoder repeats it, and training adds the rest.

Each of three groups of channels carries +x, -x and two constants, for one colour x: beside the constants the last norm
only scales, by a known factor, and silu(x) - silu(-x) = x undoes the activation.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

CONSTANT = 6.0
"""Large beside a colour, so that the scale hardly depends on the picture."""


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Set the weights that carry colours, in place; residual branches begin at nothing, the others stay random."""
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            parameter.zero_()
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and quant.bias is not None and post is not None and post.bias is not None
    latents = post.in_channels
    halves: Any = ((vae.encoder, vae.encoder.down_blocks), (vae.decoder, vae.decoder.up_blocks))
    for half, levels in halves:
        _carry(half.conv_in, inner=False)
        for level in levels:
            for resnet in level.resnets:
                if resnet.conv_shortcut is not None:
                    _carry(resnet.conv_shortcut)
            for sampler in level.downsamplers or [] if half is vae.encoder else level.upsamplers or []:
                _carry(sampler.conv, averages=half is vae.encoder)
        _read(half.conv_out, half.conv_norm_out)
    quant.weight.zero_()
    quant.bias.zero_()
    quant.weight[:latents, :latents, 0, 0] = torch.eye(latents)
    quant.bias[latents:] = -6  # little noise: it would drown what little latents say at first
    post.weight[:, :, 0, 0] = torch.eye(latents)
    post.bias.zero_()


def _groups(width: int) -> list[int]:
    """The first channel of each colour's group."""
    size = width // 8
    assert size >= 4, "a group must hold a colour twice and two constants"
    return [colour * size for colour in range(3)]


def _carry(conv: nn.Conv2d, *, inner: bool = True, averages: bool = False) -> None:
    """Let a convolution pass colours from its input's groups (or first three channels) to its output's."""
    assert conv.bias is not None
    taps = torch.zeros(conv.kernel_size)
    if averages:
        taps[:2, :2] = 0.25  # the down-sampling convolution pads on the right and below only
    else:
        taps[conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    outs = _groups(conv.out_channels)
    size = conv.out_channels // 8
    conv.weight[: 3 * size].zero_()
    conv.bias[: 3 * size].zero_()
    for colour, out in enumerate(outs):
        source = _groups(conv.in_channels)[colour] if inner else colour
        conv.weight[out, source], conv.weight[out + 1, source] = taps, -taps
        conv.bias[out + 2], conv.bias[out + 3] = CONSTANT, -CONSTANT


def _read(conv: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Let a last convolution give the colours back."""
    assert conv.bias is not None
    size = conv.in_channels // 8
    scale = (2 * (CONSTANT**2 + 0.4) / size) ** 0.5
    conv.weight *= 0.1
    conv.weight[:3].zero_()
    conv.bias.zero_()
    for colour, group in enumerate(_groups(conv.in_channels)):
        conv.weight[colour, group, 1, 1], conv.weight[colour, group + 1, 1, 1] = scale, -scale
