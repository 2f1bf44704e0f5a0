"""Adapters as the tensors of a file, in one of three dialects.

kohya's and comfy's differ in how modules are called, and have words for every kind that is only added, and for DoRA.
The diffusers dialect has words for LoRA and DoRA: alpha is folded into B, and every module of a component has the same
rank, filled up with zeros, because older readers take one strength for all of them (`tuner.weights.layouts.peft`).
"""

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Product
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.hadamard import Hadamard
from tuner.weights.adapters.kronecker import Kronecker
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts import kohya, peft
from tuner.weights.layouts.modules import Dialect, Modules
from tuner.weights.lora import A, B, LoraWeights


def to_tensors(
    adapters: Adapters, dialect: Dialect, modules: Modules | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a file that reads back as `adapters`.

    Args:
        adapters: what is written.
        dialect: how.
        modules: those of the network; None where the names are to stay as they are, as the dialect is that of the file.
        dtype: of factors and of the differences of layers; None keeps what they have. Differences of norms and biases
            keep theirs, as they are small in both ways. Alphas are float32.

    Raises:
        DataError: the dialect has no word for a module or a kind of adapter.
    """
    if modules is None and adapters.resolved:
        modules = Modules.of_tensors(adapters.changes)
    if modules is None and dialect != adapters.dialect:
        raise DataError(
            f"names of the {adapters.dialect} dialect can be said in the {dialect} dialect only where the modules of "
            "the network are known; give its base"
        )
    if dialect == "diffusers":
        return _diffusers(adapters, dtype)
    tensors: dict[str, Tensor] = {}
    for name, change in adapters.changes.items():
        module = name.rpartition(".")[0]
        spelling = module if modules is None else modules.spell(module, dialect)
        for suffix, tensor in _kohya(change, module).items():
            kept = dtype is None or tensor.ndim < 2
            tensors[spelling + suffix] = (tensor if kept else tensor.to(dtype)).contiguous()
    return tensors


def _kohya(change: Change, module: str) -> dict[str, Tensor]:
    """The tensors of one change by what follows the module's name."""
    match change:
        case LowRank(product, scale):
            ones = (1,) * (product.right.ndim - 2 if product.core is None else 2)
            right = product.right.reshape(*product.right.shape, *((1, 1) if product.core is not None else ()))
            parts = {kohya.DOWN: right, kohya.UP: product.left.reshape(*product.left.shape, *ones)}
            if product.core is not None:
                parts[".lora_mid.weight"] = product.core
            return {**parts, kohya.ALPHA: _number(scale * product.rank)}
        case Hadamard(first, second, scale):
            parts = {**_pair("hada", "1", "1", first), **_pair("hada", "2", "2", second)}
            return {**parts, kohya.ALPHA: _number(scale * first.right.shape[0])}
        case Kronecker(first, second, scale):
            ranks = [factor.right.shape[0] for factor in (first, second) if isinstance(factor, Product)]
            if not ranks and scale != 1:
                assert isinstance(first, Tensor)
                first = scale * first
            parts = {**_pair("lokr", "1", "1", first), **_pair("lokr", "2", "2", second)}
            return {**parts, kohya.ALPHA: _number(scale * ranks[-1] if ranks else 1.0)}
        case Full(values, slot, norm):
            words = {"weight": ".w_norm", "bias": ".b_norm"} if norm else {"weight": ".diff", "bias": ".diff_b"}
            return {words[slot]: values}
        case Decomposed(inner, magnitude):
            scale = magnitude.reshape(-1, *[1] * (len(inner.shape) - 1)) if magnitude.ndim == 1 else magnitude
            return {**_kohya(inner, module), ".dora_scale": scale}
        case _:
            raise DataError(f"{module}: a {type(change).__name__.lower()} cannot be written; bake it into its base")


def _pair(kind: str, number: str, core: str, factor: Tensor | Product) -> dict[str, Tensor]:
    """LoHa's and LoKr's tensors of one factor."""
    if isinstance(factor, Tensor):
        return {f".{kind}_w{number}": factor}
    left = factor.left if factor.core is None else factor.left.T
    parts = {f".{kind}_w{number}_a": left, f".{kind}_w{number}_b": factor.right}
    return parts if factor.core is None else {**parts, f".{kind}_t{core}": factor.core}


def _diffusers(adapters: Adapters, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in diffusers' names; computed in float32, so that there is one rounding."""
    factors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    magnitudes: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, change in adapters.changes.items():
        module = name.rpartition(".")[0]
        inner = change.inner if isinstance(change, Decomposed) else change
        if not isinstance(inner, LowRank) or inner.slot != "weight":
            raise DataError(
                f"{name}: the diffusers dialect has no word for what is done to it "
                f"({type(change).__name__.lower()}); choose kohya's"
            )
        if isinstance(change, Decomposed):
            if change.magnitude.shape[0] != change.magnitude.numel():
                raise DataError(f"{name}: the diffusers dialect has no word for a DoRA of inputs; choose kohya's")
            kernel = len(inner.shape) == 4
            outputs = change.magnitude.reshape(1, -1, 1, 1) if kernel else change.magnitude.flatten()
            magnitudes[module + ".lora_magnitude_vector"] = outputs
        left, right = inner.product.single
        ones = (1,) * (len(inner.shape) - 2)
        factors[module + A] = right.reshape(-1, *inner.shape[1:])
        factors[module + B] = left.reshape(*left.shape, *ones)
        alphas[module] = inner.scale * inner.rank
        dtypes[module] = dtype or inner.product.left.dtype
    tensors = peft.rename(LoraWeights(factors, alphas))
    cast = {name: tensor.to(dtypes[name.removesuffix(A).removesuffix(B)]) for name, tensor in tensors.items()}
    return {**cast, **{name: values.to(dtype or values.dtype) for name, values in magnitudes.items()}}


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
