"""A LoRA at rest: pairs of small matrices by the canonical name of the module that they change.

Module names are diffusers' own with the component in front, `unet.down_blocks.0.….to_q`; a text encoder's have
`text_encoder.text_model.`, whatever the installed transformers version calls them. Tensor names add `.lora_A.weight`
and `.lora_B.weight`.
"""

import math
from collections import Counter
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

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of the weight of `module`."""
        return (self.tensors[module + B].shape[0], *self.tensors[module + A].shape[1:])

    def distance(self, other: "LoraWeights", module: str) -> float:
        """‖delta - delta'‖ / ‖delta‖ in Frobenius norms, for deltas of one shape; infinite if only this one is zero.

        With delta = U V, both norms come from the small matrices Uᵀ U and V Vᵀ, so that no delta is formed.
        """
        u, v = self._factors(module)
        other_u, other_v = other._factors(module)
        difference = _norm(torch.cat([u, -other_u], dim=1), torch.cat([v, other_v]))
        size = _norm(u, v)
        return difference / size if size else (math.inf if difference else 0.0)

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """U `[out, rank]` and V `[rank, in]` in float64, with delta = U V."""
        down, up = self.tensors[module + A].double(), self.tensors[module + B].double()
        return self.alphas[module] / self.rank(module) * up.flatten(1), down.flatten(1)

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

    def with_one_alpha(self) -> "LoraWeights":
        """The same deltas with one alpha for all modules of a component, the one that most of them have.

        diffusers ignores the others' when it reads kohya's names.
        """
        counts = Counter((module.partition(".")[0], alpha) for module, alpha in sorted(self.alphas.items()))
        most: dict[str, float] = {}
        for (component, alpha), _ in counts.most_common():
            most.setdefault(component, alpha)
        alphas = {module: most[module.partition(".")[0]] for module in self.alphas}
        scaled = {module + B: self.alphas[module] / alphas[module] * self.tensors[module + B] for module in alphas}
        return LoraWeights({**self.tensors, **scaled}, alphas)

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """With every tensor in `dtype`, on the CPU."""
        return LoraWeights({name: tensor.to("cpu", dtype) for name, tensor in self.tensors.items()}, self.alphas)


def _norm(u: Tensor, v: Tensor) -> float:
    """‖u v‖ in the Frobenius norm."""
    return ((u.T @ u) * (v @ v.T)).sum().clamp(min=0).sqrt().item()
