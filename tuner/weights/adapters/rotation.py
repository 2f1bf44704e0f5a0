"""OFT (Qiu et al. 2023, arXiv:2306.07280) and BOFT (Liu et al. 2023, arXiv:2311.06243): W' is W, turned.

R is orthogonal and made of small blocks by Cayley's transform of skew matrices Q. The two programs that write such
files differ in everything else:

| | LyCORIS, kohya | peft |
|---|---|---|
| turns | the outputs, W' = Rᵀ W (OFT), R W (BOFT) | the inputs, W' = W Rᵀ |
| R | (I + Q)(I - Q)⁻¹ | (I - Q)(I + Q)⁻¹ or 1 + 2 Q + 2 Q² … + Q⁴ |
| Q | `blocks` - `blocks`ᵀ | from the numbers above its diagonal, row by row |
| beside | a bound on ‖Q‖, alpha · out; a factor for each output | |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Parts, Slot, Transform


@dataclass(frozen=True)
class Rotation(Transform):
    """Rᵀ W, or W Rᵀ when inputs are turned, with R of equal blocks on the diagonal; then each output times a factor."""

    blocks: Tensor
    """`[number, size, size]`, float64."""
    of_inputs: bool
    matrix: tuple[int, ...]
    """Sizes of the weight as far as they are known: of outputs, or of `[0, columns]`."""
    rescale: Tensor | None = None
    slot: Slot = "weight"

    @staticmethod
    def read(parts: Parts) -> "Rotation | Butterfly":
        """From LyCORIS' `blocks`, `[number, size, size]` or of BOFT `[layers, number, size, size]`."""
        blocks, rescale = parts["blocks"], parts.get("rescale")
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
            raise DataError(f"blocks of shape {list(blocks.shape)}, expected square ones")
        out = blocks.shape[-3] * blocks.shape[-1]
        if rescale is not None and rescale.numel() != out:
            raise DataError(f"{rescale.numel()} factors for {out} outputs")
        skew = blocks.double() - blocks.double().transpose(-1, -2)
        bound = (parts.alpha or 0.0) * out
        size = skew.square().sum().sqrt().item()
        if 0 < bound < size:
            skew = skew * (bound / size)
        turned = cayley(-skew)
        if blocks.ndim == 4:
            return Butterfly(turned, rescale)
        return Rotation(turned, False, (out,), rescale)

    @staticmethod
    def read_peft(parts: Parts) -> "Rotation":
        """From peft's `rotation`, `[number, size · (size - 1) / 2]`, and its config."""
        values, settings = parts["rotation"], parts.settings
        if settings is None:
            raise DataError("peft's OFT cannot be understood without its adapter_config.json; put that beside it")
        if settings.get("coft") or settings.get("block_share"):
            raise DataError("peft's OFT with coft or block_share is not read")
        size = int((1 + (1 + 8 * values.shape[-1]) ** 0.5) / 2)
        if values.ndim != 2 or size * (size - 1) // 2 != values.shape[-1]:
            raise DataError(f"a rotation of shape {list(values.shape)}, expected the upper halves of square blocks")
        rows, columns = torch.triu_indices(size, size, 1)
        skew = torch.zeros(len(values), size, size, dtype=torch.float64)
        skew[:, rows, columns] = values.double()
        skew = skew - skew.transpose(-1, -2)
        if settings.get("use_cayley_neumann"):
            terms = settings.get("num_cayley_neumann_terms")
            if type(terms) is not int or not 1 <= terms <= 100:
                raise DataError("adapter_config.json: num_cayley_neumann_terms: expected a number from 1 to 100")
            blocks = _series(skew, terms)
        else:
            blocks = cayley(skew)
        return Rotation(blocks, True, (0, len(values) * size))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, with 0 where any size will do."""
        return self.matrix

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the blocks make up the outputs, or the columns, of a weight of `shape`."""
        if len(shape) < 2:
            return False
        return self.matrix[1] == torch.Size(shape[1:]).numel() if self.of_inputs else self.matrix[0] == shape[0]

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        number, size, _ = self.blocks.shape
        matrix = weight.double().flatten(1)
        if self.of_inputs:
            turned = torch.einsum("onj,nij->oni", matrix.reshape(-1, number, size), self.blocks)
        else:
            turned = torch.einsum("nij,nic->njc", self.blocks, matrix.reshape(number, size, -1))
        return _rescaled(turned.reshape(weight.shape), self.rescale).to(weight.dtype)


@dataclass(frozen=True)
class Butterfly(Transform):
    """A product of rotations, each with its blocks spread twice as far over the outputs as the one before."""

    blocks: Tensor
    """`[layers, number, size, size]`, float64."""
    rescale: Tensor | None = None
    slot: Slot = "weight"

    def __post_init__(self) -> None:
        layers, number, size, _ = self.blocks.shape
        if size % 2 or (number * size) % (2**layers * (size // 2)):
            raise DataError(f"blocks of shape {list(self.blocks.shape)} make no butterfly")

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of outputs."""
        return (self.blocks.shape[1] * self.blocks.shape[2],)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of `shape` has these outputs."""
        return len(shape) > 1 and shape[0] == self.shape[0]

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        matrix = weight.double().flatten(1)
        for layer in range(len(self.blocks)):
            order = self.order(layer)
            mixed = torch.einsum("nij,njc->nic", self.blocks[layer], matrix[order].reshape(*self.blocks.shape[1:3], -1))
            matrix = torch.empty_like(matrix)
            matrix[order] = mixed.flatten(0, 1)
        return _rescaled(matrix.reshape(weight.shape), self.rescale).to(weight.dtype)

    def order(self, layer: int) -> Tensor:
        """Which outputs the blocks of a layer take, in turn: in groups of 2 k, every output and the k-th after it."""
        far = 2**layer * (self.blocks.shape[2] // 2)
        return torch.arange(self.shape[0]).reshape(-1, 2, far).transpose(1, 2).flatten()


def cayley(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹, orthogonal when Q is skew."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    inverse: Tensor = torch.inverse(identity + skew)
    return (identity - skew) @ inverse


def _series(skew: Tensor, terms: int) -> Tensor:
    """1 + 2 Q + 2 Q² …, Cayley's transform of -Q as peft sums it: from three terms on, the last power counts once."""
    last = terms - 1 if terms <= 2 else max(terms, 4) - 1
    power = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    total = power
    for number in range(1, last + 1):
        power = power @ skew
        total = total + (1.0 if number == last and terms > 2 else 2.0) * power
    return total


def _rescaled(weight: Tensor, factors: Tensor | None) -> Tensor:
    return weight if factors is None else weight * factors.double().reshape(-1, *[1] * (weight.ndim - 1))
