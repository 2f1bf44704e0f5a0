"""A LoRA at rest: pairs of small matrices by the canonical name of the module that they change.

Module names are diffusers' own with the component in front, `unet.down_blocks.0.….to_q`; a text encoder's have
`text_encoder.text_model.`, whatever the installed transformers version calls them. Tensor names add `.lora_A.weight`
and `.lora_B.weight`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError

A = ".lora_A.weight"
B = ".lora_B.weight"


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA adds to a network.

    Raises:
        DataError: a module without its A, its B or its alpha, or an A and a B that do not fit.
    """

    tensors: Mapping[str, Tensor]
    """By canonical tensor name: A is `[rank, in]` or, for convolutions, `[rank, in, k, k]`; B `[out, rank(, 1, 1)]`."""
    alphas: Mapping[str, float]
    """By module."""

    def __post_init__(self) -> None:
        expected = {module + suffix for module in self.alphas for suffix in (A, B)}
        if lost := sorted(expected - set(self.tensors)):
            raise DataError(f"{lost[0]}: missing ({len(lost)} such); the LoRA is not complete")
        if extra := sorted(set(self.tensors) - expected):
            raise DataError(f"{extra[0]}: without an alpha, or no part of a LoRA ({len(extra)} such)")
        for module in self.alphas:
            down, up = self.tensors[module + A], self.tensors[module + B]
            if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or up[0, 0].numel() != 1:
                raise DataError(f"{module}: A {tuple(down.shape)} and B {tuple(up.shape)} are not of one rank")

    @property
    def modules(self) -> list[str]:
        """Names of the changed modules, sorted."""
        return sorted(self.alphas)

    def rank(self, module: str) -> int:
        """How many directions `module` is changed in."""
        return self.tensors[module + A].shape[0]

    def delta(self, module: str) -> Tensor:
        """What is added to the weight of `module`: alpha / rank · B A, float32, of the weight's shape."""
        down, up = self.tensors[module + A].float(), self.tensors[module + B].float()
        product = up.flatten(1) @ down.flatten(1)
        return (self.alphas[module] / self.rank(module) * product).reshape(up.shape[0], *down.shape[1:])

    def balanced(self) -> "LoraWeights":
        """The same deltas from an A and a B of about the same size.

        B starts at zero and stays small; in half precision its smallest values would lose digits, or vanish. The
        factor is a power of two, so nothing is rounded.
        """
        tensors: dict[str, Tensor] = {}
        for module in self.alphas:
            down, up = self.tensors[module + A].float(), self.tensors[module + B].float()
            sizes = down.square().mean().item(), up.square().mean().item()
            usable = all(0 < size < math.inf for size in sizes)
            factor = 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 4) if usable else 1.0
            tensors[module + A] = down / factor
            tensors[module + B] = up * factor
        return LoraWeights(tensors, self.alphas)

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """With every tensor in `dtype`, on the CPU."""
        return LoraWeights({name: tensor.to("cpu", dtype) for name, tensor in self.tensors.items()}, self.alphas)
