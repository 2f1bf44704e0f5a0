"""LoHa: updates that are products, element by element, of two low-rank matrices, on peft's layers.

FedPara (Hyeon-Woo et al. 2021, arXiv:2108.06098), for diffusion models in LyCORIS (Yeh et al. 2023, arXiv:2309.14859).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
from torch import Tensor, nn

from tuner.methods._adapter import PeftFiles, RankedAdapter, Size, check_tucker, still
from tuner.methods._peft import ADAPTER, check_scale, inject, never_left_out, ranked_files
from tuner.methods.base import Method
from tuner.weights.adapters.base import Product
from tuner.weights.adapters.hadamard import Hadamard


@dataclass(frozen=True, kw_only=True)
class LoHa(RankedAdapter):
    """Learn `(a1 b1) * (a2 b2)`, of rank up to `rank` squared; it adds `alpha / rank` times that to a weight."""

    kind: ClassVar[str] = "loha"
    drawn: ClassVar[str] = r"^hada_(w1_[ab]|w2_a|t[12])$"

    tucker: bool = False
    """Give convolutions larger than 1x1 a small core with the kernel, instead of factors with it: fewer numbers."""

    @property
    def dense(self) -> bool:
        return True  # peft takes the shape from the weight

    def check(self, learning: Mapping[str, nn.Module]) -> None:
        check_tucker(self.tucker, learning)

    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        inject(network, sizes, self._config, "hada_w1_a")
        for name, size in sizes.items():
            check_scale(network.get_submodule(name), size, size.alpha / size.rank)

    def begin(self, layer: Any, name: str, seed: int) -> None:
        super().begin(layer, name, seed)
        never_left_out(layer)

    def in_peft(self, layers: Mapping[str, Any]) -> PeftFiles:
        return ranked_files(layers, self._config)

    def _config(self, **options: Any) -> peft.LoHaConfig:
        return peft.LoHaConfig(use_effective_conv2d=self.tucker, **options)

    def change(self, layer: Any) -> Hadamard:
        def product(number: int) -> Product:
            left, right = (still(getattr(layer, f"hada_w{number}_{part}")[ADAPTER]) for part in "ab")
            cores: Mapping[str, Tensor] = getattr(layer, f"hada_t{number}")
            return Product(left.T, right, still(cores[ADAPTER])) if ADAPTER in cores else Product(left, right)

        return Hadamard(product(1), product(2), layer.scaling[ADAPTER])


SPEC: type[Method] = LoHa
