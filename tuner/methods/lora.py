"""LoRA: low-rank updates to chosen layers (Hu et al. 2021, arXiv:2106.09685), on peft's layers.

And what was made of it since: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024, arXiv:2402.09353),
PiSSA (Meng et al. 2024, arXiv:2404.02948), LoftQ (Li et al. 2023, arXiv:2310.08659) and LoRA+ (Hayou et al. 2024,
arXiv:2402.12354).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from tuner.errors import ConfigError
from tuner.methods._adapter import RankedAdapter, Size, still
from tuner.methods._dropout import PositionalDropout
from tuner.methods._peft import ADAPTER, check_scale, inject
from tuner.methods.base import Method
from tuner.rng import Position
from tuner.weights.adapters.base import Change, Product
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class Lora(RankedAdapter):
    """Learn `B A`, of rank `rank`, beside each target layer; it adds `alpha / rank * B A x`."""

    kind: ClassVar[str] = "lora"
    drawn: ClassVar[str] = r"^lora_A\."

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank, so that high ranks learn as fast as low ones (rsLoRA)."""
    dora: bool = False
    """Learn a magnitude for each output too, and with A and B the direction alone (DoRA); about twice as slow."""
    init: Literal["zero", "pissa", "loftq"] = "zero"
    """What the update begins as. `zero`: B is zero and A random. `pissa`: the base's largest singular directions, which
    are taken out of the base's weights as they are held while training. `loftq`: what `model.quantize` has lost of
    them, as far as the rank goes (LoftQ, one iteration). The files are for the base as it was, in any case."""
    dropout: float = 0.0
    """The share of A's inputs that are set to 0 while training."""
    lora_plus: float = 1.0
    """How many times as fast as A B learns (LoRA+); its paper has 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.lora_plus <= 0:
            raise ValueError(f"lora_plus must be positive, got {self.lora_plus}")
        if self.dora and self.init != "zero":
            raise ValueError(f"dora and init = {self.init!r} both take the base's weights apart; choose one of them")

    @property
    def dense(self) -> bool:
        return self.dora or self.init == "pissa"

    def rate(self, own: str) -> float:
        return self.lora_plus if own.startswith("lora_B.") else 1.0

    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        def config(**patterns: Any) -> peft.LoraConfig:
            return peft.LoraConfig(r=1, lora_alpha=1, use_rslora=self.rslora, use_dora=self.dora, **patterns)

        inject(network, sizes, config, "lora_A")
        for name, size in sizes.items():
            layer: Any = network.get_submodule(name)
            check_scale(layer, size, size.alpha / (math.sqrt(size.rank) if self.rslora else size.rank))

    def check(self, learning: Mapping[str, nn.Module]) -> None:
        if self.init == "loftq" and not any(hasattr(layer, "exact") for layer in learning.values()):
            raise ConfigError(
                "method.init: 'loftq' makes up for model.quantize, and no layer that learns is quantized; leave it out"
            )

    def begin(self, layer: Any, name: str, seed: int) -> None:
        super().begin(layer, name, seed)
        if self.dropout:
            layer.lora_dropout[ADAPTER] = PositionalDropout(self.dropout, name)
        if self.dora:  # peft has it in the base's dtype
            magnitude: nn.Parameter = layer.lora_magnitude_vector[ADAPTER].weight
            magnitude.data.copy_(_outputs_norm(layer.base_layer.weight.detach().float()).reshape(magnitude.shape))
        if self.init == "pissa":
            _take_principal(layer, name)
        if self.init == "loftq" and hasattr(layer.base_layer, "exact"):
            _make_up(layer, name)

    def weight(self, layer: Any) -> Tensor:
        own = layer.base_layer.weight
        if self.init != "pissa":
            return own
        first, second = layer.principal_B.flatten(1), layer.principal_A.flatten(1)
        return own.float() + layer.scaling[ADAPTER] * (first @ second).reshape(own.shape)

    def tell(self, layer: Any, positions: Sequence[Position]) -> None:
        if self.dropout:
            layer.lora_dropout[ADAPTER].positions = positions

    def change(self, layer: Any) -> Change:
        down, up = still(layer.lora_A[ADAPTER].weight), still(layer.lora_B[ADAPTER].weight).flatten(1)
        scale = layer.scaling[ADAPTER]
        if hasattr(layer, "principal_B"):
            return LowRank(
                _from_principal(up, down, still(layer.principal_B).flatten(1), still(layer.principal_A)), scale
            )
        update = LowRank(Product(up, down), scale)
        return Decomposed(update, still(layer.lora_magnitude_vector[ADAPTER].weight).flatten()) if self.dora else update


def _outputs_norm(weight: Tensor) -> Tensor:
    """The length of each output's row, as peft computes it, to the bit."""
    if weight.ndim == 2:
        return torch.linalg.norm(weight, dim=1)
    return weight.norm(p=2, dim=(1, 2, 3))


def _take_principal(layer: Any, name: str) -> None:
    """Move the largest singular directions of the base's weight into A and B, which were fresh."""
    down, up = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    rank, scale, weight = len(down), layer.scaling[ADAPTER], layer.base_layer.weight
    matrix = weight.detach().float().flatten(1)
    _check_rank(rank, matrix, name, "PiSSA")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    up.data.copy_((left[:, :rank] * root).reshape(up.shape))
    down.data.copy_((root[:, None] * right[:rank]).reshape(down.shape))
    _remember(layer, up, down)
    taken = scale * (up.detach().flatten(1) @ down.detach().flatten(1))
    weight.data = (matrix - taken).reshape(weight.shape).to(weight.dtype)


def _make_up(layer: Any, name: str) -> None:
    """Move what is nearest, of the adapter's rank, to what quantizing has lost of the base's weight into A and B.

    With U the first eigenvectors of L Lᵀ, L being what is lost, that is U Uᵀ L (Eckart and Young 1936): on a processor
    many times as fast as the singular values of a layer as large as Flux has.
    """
    down, up = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    rank, scale = len(down), layer.scaling[ADAPTER]
    held = dequantize_module_weight(layer.base_layer).detach().double()
    lost = layer.base_layer.exact().to(held.device).double() - held
    _check_rank(rank, lost, name, "LoftQ")
    wide = lost.shape[0] <= lost.shape[1]
    first = torch.linalg.eigh(lost @ lost.T if wide else lost.T @ lost).eigenvectors[:, -rank:].flip(1)
    left, right = (first, first.T @ lost) if wide else (lost @ first, first.T)
    size = (right.norm() / left.norm()).sqrt() if lost.any() else torch.ones(())  # so that both begin about as large
    up.data.copy_(left * size / scale**0.5)
    down.data.copy_(right / size / scale**0.5)
    _remember(layer, up, down)


def _check_rank(rank: int, matrix: Tensor, name: str, what: str) -> None:
    """Raises: ConfigError: a matrix has not as many singular values."""
    if rank > min(matrix.shape):
        raise ConfigError(f"method.rank: {name} has {min(matrix.shape)} singular values, {what} needs {rank}; lower it")


def _remember(layer: Any, up: Tensor, down: Tensor) -> None:
    """What A and B begin as, which is no part of what they learn."""
    layer.register_buffer("principal_B", up.detach().clone(), persistent=False)
    layer.register_buffer("principal_A", down.detach().clone(), persistent=False)


def _from_principal(up: Tensor, down: Tensor, first_up: Tensor, first_down: Tensor) -> Product:
    """B A - B₀ A₀, of twice the rank, as B (A - A₀) + (B - B₀) A₀: a difference of large products would be lost in half
    precision, a sum of small ones is not."""
    parts = [_balanced(up, down - first_down), _balanced(up - first_up, first_down)]
    return Product(torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts]))


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of about the same size, by a power of two, which rounds nothing."""
    sizes = left.norm().item(), right.norm().item()
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2) if all(sizes) else 1.0
    return left * factor, right / factor


SPEC: type[Method] = Lora
