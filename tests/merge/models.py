"""Models for comparisons: small networks with the names of a real one, and changes made to them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.merge.test_blocks import diffusers
from tuner.weights.store import SafetensorsFile

TEXT = [f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1.weight" for layer in range(4)]
VAE = [f"vae.decoder.up_blocks.{level}.resnets.0.conv1.weight" for level in range(4)]
NAMES = [*diffusers(4), *TEXT, *VAE]


def network(seed: int, numbers: int = 1600) -> dict[str, Tensor]:
    """A network as it might be trained from `seed`: matrices around 0, scales around 1, small biases."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in NAMES:
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.1 * torch.randn(40, generator=rng)
        elif name.endswith("bias"):
            tensors[name] = 0.01 * torch.randn(40, generator=rng)
        else:
            tensors[name] = 0.05 * torch.randn(numbers // 40, 40, generator=rng)
    return tensors


def tuned(base: Mapping[str, Tensor], seed: int, amount: float, only: str = "unet.") -> dict[str, Tensor]:
    """`base` with changes of `amount` of each tensor's norm to the tensors whose names start with `only`."""
    rng = torch.Generator().manual_seed(seed)
    changed = dict(base)
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=rng)
        if name.startswith(only):
            changed[name] = tensor + amount * tensor.norm() * noise / noise.norm()
    return changed


def saved(path: Path, tensors: Mapping[str, Tensor]) -> SafetensorsFile:
    """`tensors` in a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return SafetensorsFile(path)
