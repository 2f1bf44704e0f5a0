"""LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098): ΔW = scale · (a₁ b₁) ∘ (a₂ b₂), scale = alpha / rank."""

from dataclasses import dataclass

from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Difference, Parts, Product, Slot


@dataclass(frozen=True)
class Hadamard(Difference):
    """scale · first ∘ second."""

    first: Product
    second: Product
    scale: float
    slot: Slot = "weight"

    flattened = True

    @staticmethod
    def read(parts: Parts) -> "Hadamard":
        """From `w1_a` `[out, rank]` and `w1_b` `[rank, in · k · k]`, `w2_…` alike.

        With cores, `t1` and `t2` of `[rank, rank, k, k]`, it is `w1_a` `[rank, out]` and `w1_b` `[rank, in]`.
        """
        first, second = (_product(parts, number) for number in "12")
        if first.shape != second.shape:
            raise DataError(f"factors make {list(first.shape)} and {list(second.shape)}, expected one shape")
        return Hadamard(first, second, parts.scale(parts["w1_b"].shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix', or with cores the weight's."""
        return self.first.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added, float32."""
        (left, right), (other_left, other_right) = self.first.single, self.second.single
        return (left[start:stop] @ right).mul_(other_left[start:stop] @ other_right).mul_(self.scale)

    def dense(self) -> Tensor:
        """All that is added, float64."""
        (left, right), (other_left, other_right) = self.first.double(), self.second.double()
        return self.scale * (left @ right) * (other_left @ other_right)


def _product(parts: Parts, number: str) -> Product:
    left, right, core = parts[f"w{number}_a"], parts[f"w{number}_b"], parts.get(f"t{number}")
    return Product(left, right) if core is None else Product(left.T, right, core)
