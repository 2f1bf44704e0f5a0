"""OFT (Qiu et al. 2023, arXiv:2306.07280) and BOFT (Liu et al. 2023, arXiv:2311.06243): W' is W, turned.

R is orthogonal and made of small blocks by Cayley's transform of skew matrices Q. The two programs that write such
files differ in everything else:

| | LyCORIS, kohya | peft |
|---|---|---|
| turns | the outputs, W' = Rᵀ W (OFT), R W (BOFT) | the inputs, W' = W Rᵀ |
| R | (I + Q)(I - Q)⁻¹ | (I - Q)(I + Q)⁻¹ or 1 + 2 Q + 2 Q² … + Q⁴ |
| Q | `blocks` - `blocks`ᵀ | OFT: from the numbers above its diagonal, row by row; BOFT: (`R` - `R`ᵀ) / 2 |
| beside | a bound on ‖Q‖ of all blocks, alpha · out | coft: a bound on ‖Q‖ of each block |
| | a factor for each output | BOFT: a factor for each output |
| BOFT's layers mix | output i with output i + k | halves of blocks |

So what one of them has learned the other has no words for. The numbers of a file are kept as they are, so that it is
written again to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Parts, Slot, Transform


@dataclass(frozen=True)
class Rotation(Transform):
    """Rᵀ W with R of equal blocks on the diagonal; then each output times a factor."""

    given: Tensor
    """LyCORIS' `blocks`, `[number, size, size]`."""
    alpha: float = 0.0
    """alpha · outputs is the largest that ‖Q‖ may be; 0: it is not bounded."""
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
        return (Butterfly if blocks.ndim == 4 else Rotation)(blocks, parts.alpha or 0.0, rescale)

    @cached_property
    def blocks(self) -> Tensor:
        """R's, float64."""
        return cayley(-_bounded(_skew(self.given), self.alpha * self.shape[0]))

    @property
    def size(self) -> int:
        """How many outputs are turned together."""
        return self.given.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of outputs."""
        return (self.given.shape[0] * self.size,)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of `shape` has these outputs."""
        return len(shape) > 1 and shape[0] == self.shape[0]

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        number, size, _ = self.blocks.shape
        matrix = weight.double().flatten(1).reshape(number, size, -1)
        turned = torch.einsum("nij,nic->njc", self.blocks, matrix)
        return _rescaled(turned.reshape(weight.shape), self.rescale).to(weight.dtype)

    def rows_from(self, start: int, stop: int) -> "Rotation":
        """Of the outputs from `start` to `stop`, which are whole blocks."""
        free = self.free()
        rescale = None if self.rescale is None else self.rescale[start:stop]
        return Rotation(free.given[start // self.size : stop // self.size], 0.0, rescale, self.slot)

    @staticmethod
    def stacked(parts: Sequence["Rotation"]) -> "Rotation":
        """Those of layers that are put one on another; their blocks have one size, and all have factors, or none."""
        free = [part.free() for part in parts]
        scales = [part.rescale for part in free if part.rescale is not None]
        return Rotation(torch.cat([part.given for part in free]), 0.0, torch.cat(scales) if scales else None)

    def free(self) -> "Rotation":
        """The same without a bound, which is about all blocks together."""
        skew = _skew(self.given)
        bounded = _bounded(skew, self.alpha * self.shape[0])
        if torch.equal(skew, bounded):
            return replace(self, alpha=0.0)
        size, most = (values.square().sum().sqrt() for values in (skew, bounded))
        return replace(self, given=self.given.double() * (most / size), alpha=0.0)


@dataclass(frozen=True)
class Butterfly(Transform):
    """A product of rotations, each with its blocks spread twice as far over the outputs as the one before."""

    given: Tensor
    """LyCORIS' `blocks`, `[layers, number, size, size]`."""
    alpha: float = 0.0
    """As of `Rotation`."""
    rescale: Tensor | None = None
    slot: Slot = "weight"

    def __post_init__(self) -> None:
        layers, number, size, _ = self.given.shape
        if size % 2 or (number * size) % (2**layers * (size // 2)):
            raise DataError(f"blocks of shape {list(self.given.shape)} make no butterfly")

    @cached_property
    def blocks(self) -> Tensor:
        """R's, float64."""
        return cayley(-_bounded(_skew(self.given), self.alpha * self.shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of outputs."""
        return (self.given.shape[1] * self.given.shape[2],)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of `shape` has these outputs."""
        return len(shape) > 1 and shape[0] == self.shape[0]

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        matrix = weight.double().flatten(1)
        for layer in range(len(self.blocks)):
            matrix = _mixed(matrix, self.blocks[layer], self.order(layer))
        return _rescaled(matrix.reshape(weight.shape), self.rescale).to(weight.dtype)

    def order(self, layer: int) -> Tensor:
        """Which outputs the blocks of a layer take, in turn: in groups of 2 k, every output and the k-th after it."""
        far = 2**layer * (self.given.shape[2] // 2)
        return torch.arange(self.shape[0]).reshape(-1, 2, far).transpose(1, 2).flatten()


@dataclass(frozen=True)
class InputRotation(Transform):
    """peft's OFT: W Rᵀ, with R of equal blocks on the diagonal."""

    given: Tensor
    """The numbers above the diagonals, `[number, size · (size - 1) / 2]`."""
    blocks: Tensor
    """R's, `[number, size, size]`, float64."""
    shared: bool = False
    """Whether there is one block, that turns all inputs."""
    slot: Slot = "weight"

    @staticmethod
    def read(parts: Parts) -> "InputRotation":
        """From peft's `rotation` and its config."""
        values, settings = parts["rotation"], parts.settings
        if settings is None:
            raise DataError("peft's OFT cannot be understood without its adapter_config.json; put that beside it")
        size = int((1 + (1 + 8 * values.shape[-1]) ** 0.5) / 2)
        if values.ndim != 2 or size * (size - 1) // 2 != values.shape[-1]:
            raise DataError(f"a rotation of shape {list(values.shape)}, expected the upper halves of square blocks")
        rows, columns = torch.triu_indices(size, size, 1)
        skew = torch.zeros(len(values), size, size, dtype=torch.float64)
        skew[:, rows, columns] = values.double()
        skew = skew - skew.transpose(-1, -2)
        if settings.get("coft"):
            most = settings.get("eps")
            if not isinstance(most, (int, float)) or not 0 < most < float("inf"):
                raise DataError("adapter_config.json: eps: expected the bound that coft is about")
            norm = skew.square().sum(dim=(1, 2), keepdim=True).sqrt()
            skew = skew * (most / len(skew) ** 0.5 / norm).clamp(max=1.0)
        if settings.get("use_cayley_neumann"):
            terms = settings.get("num_cayley_neumann_terms")
            if type(terms) is not int or not 1 <= terms <= 100:
                raise DataError("adapter_config.json: num_cayley_neumann_terms: expected a number from 1 to 100")
            blocks = _series(skew, terms)
        else:
            blocks = cayley(skew)
        return InputRotation(values, blocks, bool(settings.get("block_share")))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, with 0 where any size will do."""
        return (0, 0 if self.shared else self.blocks.shape[0] * self.blocks.shape[1])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the blocks make up the columns of a weight of `shape`."""
        columns = torch.Size(shape[1:]).numel()
        return len(shape) > 1 and (columns % self.blocks.shape[1] == 0 if self.shared else columns == self.shape[1])

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        size = self.blocks.shape[1]
        matrix = weight.double().flatten(1).reshape(weight.shape[0], -1, size)
        turned = torch.einsum("onj,nij->oni", matrix, self.blocks.expand(matrix.shape[1], size, size))
        return turned.reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class InputButterfly(Transform):
    """peft's BOFT: W Rᵀ with R a product of rotations; then each output times a factor.

    The first turns blocks. Each one after it turns as many halves of blocks, from places twice as far apart.
    """

    given: Tensor
    """peft's `R`, `[layers, number, size, size]`."""
    factors: Tensor
    """`[out, 1]`, or of convolutions `[1, out]`."""
    slot: Slot = "weight"

    @staticmethod
    def read(parts: Parts) -> "InputButterfly":
        """From peft's `R` and `s`."""
        return InputButterfly(parts["R"], parts["s"])

    def __post_init__(self) -> None:
        shape = self.given.shape
        if len(shape) != 4 or shape[-1] != shape[-2] or not self.given.numel() or self.factors.numel() < 1:
            raise DataError(f"R of shape {list(shape)}, expected square blocks")
        layers, number, size, _ = shape
        if layers > 1 and (size % 2 or number % 2 ** (layers - 1)):
            raise DataError(f"R of shape {list(shape)} makes no butterfly")

    @cached_property
    def blocks(self) -> Tensor:
        """Those that turn, float64."""
        return cayley(_skew(self.given) / 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs and columns."""
        return (self.factors.numel(), self.given.shape[1] * self.given.shape[2])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of `shape` has these outputs and columns."""
        return len(shape) > 1 and (shape[0], torch.Size(shape[1:]).numel()) == self.shape

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        matrix = weight.double().flatten(1).T
        for layer in range(len(self.blocks)):
            matrix = _mixed(matrix, self.blocks[layer], self.order(layer))
        return _rescaled(matrix.T.reshape(weight.shape), self.factors).to(weight.dtype)

    def order(self, layer: int) -> Tensor:
        """Which columns the blocks of a layer take, in turn: halves of blocks, and those that are far from them."""
        inputs = torch.arange(self.shape[1])
        half = self.given.shape[2] // 2
        return inputs if layer == 0 else inputs.reshape(-1, 2, 2**layer, half).transpose(1, 2).flatten()


def _skew(given: Tensor) -> Tensor:
    return given.double() - given.double().transpose(-1, -2)


def _bounded(skew: Tensor, bound: float) -> Tensor:
    size = skew.square().sum().sqrt().item()
    return skew * (bound / size) if 0 < bound < size else skew


def _mixed(matrix: Tensor, blocks: Tensor, order: Tensor) -> Tensor:
    """The rows of `matrix`, taken in `order` and turned block by block."""
    turned = torch.einsum("nij,njc->nic", blocks, matrix[order].reshape(*blocks.shape[:2], -1))
    result = torch.empty_like(matrix)
    result[order] = turned.flatten(0, 1)
    return result


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
