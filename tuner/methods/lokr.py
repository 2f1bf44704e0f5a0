"""LoKr: updates that are Kronecker products, from LyCORIS (Yeh et al. 2023, arXiv:2309.14859), on peft's layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
from torch import Tensor, nn

from tuner.methods._adapter import PeftFiles, RankedAdapter, Size, check_tucker, still
from tuner.methods._peft import ADAPTER, check_scale, inject, never_left_out, ranked_files
from tuner.methods.base import Method
from tuner.weights.adapters.base import Product
from tuner.weights.adapters.kronecker import Factor, Kronecker


@dataclass(frozen=True, kw_only=True)
class LoKr(RankedAdapter):
    """Learn `w1` and `w2`; their Kronecker product, times `alpha / rank`, is added to a weight.

    The larger one, `w2`, is of rank `rank`, or whole where that would have as many numbers. Where both are whole there
    is no rank, and the product is added as it is, without `alpha`.
    """

    kind: ClassVar[str] = "lokr"
    drawn: ClassVar[str] = r"^lokr_(w1|w1_[ab]|w2_a|t2)$"

    factor: int = -1
    """The rows and columns of `w1`, or the largest divisors of a weight's that are not above it; -1 makes `w1` and `w2`
    about equally large, which has the fewest numbers."""
    full_matrix: bool = False
    """Whether `w2` is whole, whatever `rank` says."""
    decompose_both: bool = False
    """Whether `w1` is of rank `rank` too."""
    tucker: bool = False
    """Give convolutions larger than 1x1 a small core with the kernel, instead of a factor with it: fewer numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ValueError(f"factor must be at least 1, or -1, got {self.factor}")
        if self.full_matrix:
            scaled = {"alpha": self.alpha, "conv_alpha": self.conv_alpha, "alphas": self.alphas or None}
            if given := [name for name, value in scaled.items() if value is not None]:
                raise ValueError(f"{given[0]} has no effect with full_matrix = true: the product is added as it is")
            if self.decompose_both or self.tucker:
                raise ValueError("decompose_both and tucker have no effect with full_matrix = true")

    @property
    def dense(self) -> bool:
        return True  # peft takes the shape from the weight

    def check(self, learning: Mapping[str, nn.Module]) -> None:
        check_tucker(self.tucker, learning)

    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        if self.full_matrix:  # peft makes it whole from half of its longer side on
            sizes = {name: _of_any_rank(network.get_submodule(name)) for name in sizes}
        inject(network, sizes, self._config, "lokr_w1")
        for name, size in sizes.items():
            check_scale(network.get_submodule(name), size, size.alpha / size.rank)

    def begin(self, layer: Any, name: str, seed: int) -> None:
        super().begin(layer, name, seed)
        never_left_out(layer)
        if ADAPTER in layer.lokr_w1 and ADAPTER in layer.lokr_w2:  # peft divides by a rank that is not there
            layer.alpha[ADAPTER], layer.scaling[ADAPTER] = float(layer.r[ADAPTER]), 1.0

    def in_peft(self, layers: Mapping[str, Any]) -> PeftFiles:
        return ranked_files(layers, self._config)

    def _config(self, **options: Any) -> peft.LoKrConfig:
        return peft.LoKrConfig(
            use_effective_conv2d=self.tucker,
            decompose_both=self.decompose_both,
            decompose_factor=self.factor,
            init_weights="lycoris",
            **options,
        )

    def change(self, layer: Any) -> Kronecker:
        def factor(number: int) -> Factor:
            whole: Mapping[str, Tensor] = getattr(layer, f"lokr_w{number}")
            if ADAPTER in whole:
                return still(whole[ADAPTER])
            left, right = (still(getattr(layer, f"lokr_w{number}_{part}")[ADAPTER]) for part in "ab")
            if number == 2 and ADAPTER in layer.lokr_t2:
                return Product(left.T, right, still(layer.lokr_t2[ADAPTER]))
            return Product(left, right)

        return Kronecker(factor(1), factor(2), layer.scaling[ADAPTER])


def _of_any_rank(layer: nn.Module) -> Size:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rank = max(weight.shape[:2])
    return Size(rank, float(rank))


SPEC: type[Method] = LoKr
