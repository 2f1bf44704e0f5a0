"""Adapters as the tensors of a file, in one of three dialects.

kohya's and comfy's differ in how modules are called, and have words for every kind but peft's rotations. Where they
have one layer for several of diffusers' (`Modules.whole`), the changes of those are joined.

The diffusers dialect has words for LoRA and DoRA: alpha is folded into B, and every module of a component has the same
rank, filled up with zeros, because older readers take one strength for all of them (`tuner.weights.layouts.peft`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Product, Slot
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.generalized import Generalized
from tuner.weights.adapters.hadamard import Hadamard
from tuner.weights.adapters.kronecker import Kronecker
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.replacement import Replacement
from tuner.weights.adapters.rescaling import Rescaling
from tuner.weights.adapters.rotation import Butterfly, Rotation
from tuner.weights.adapters.rows import REMEDY, RESIZE, Cut, together
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
    for module, change in _layers(adapters, dialect, modules):
        spelling = module if modules is None else modules.spell(module, dialect)
        for suffix, tensor in _kohya(change, module).items():
            kept = dtype is None or tensor.ndim < 2
            tensors[spelling + suffix] = (tensor if kept else tensor.to(dtype)).contiguous()
    return tensors


def in_diffusers(name: str, change: Change) -> bool:
    """Whether the diffusers dialect has words for the change of the tensor `name`."""
    inner = change.inner if isinstance(change, Decomposed) else change
    if isinstance(change, Decomposed) and not change.per_output:
        return False
    return isinstance(inner, LowRank) and inner.slot == "weight" and peft.knows(name.rpartition(".")[0])


def _layers(adapters: Adapters, dialect: Dialect, modules: Modules | None) -> Iterator[tuple[str, Change]]:
    """The changes by the module that the file has a name for: several may be one's."""
    wholes: dict[tuple[str, Slot], dict[str, Change]] = {}
    for name, change in adapters.changes.items():
        module = name.rpartition(".")[0]
        whole = modules.whole_of(module, dialect) if modules is not None else None
        if whole is None:
            yield module, change
        else:
            wholes.setdefault((whole, change.slot), {})[module] = change
    for (whole, _), changes in wholes.items():
        assert modules is not None
        try:
            yield whole, together(changes, modules.whole[whole])
        except DataError as error:
            raise DataError(f"{', '.join(changes)}: {error}") from error


def _kohya(change: Change, module: str) -> dict[str, Tensor]:
    """The tensors of one change by what follows the module's name."""
    match change:
        case LowRank(product, scale):
            parts = _layers_of(product, kohya.UP, kohya.DOWN, ".lora_mid.weight")
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
        case Generalized(inside, added, scale):
            ones = (1,) * (len(added.shape) - 2)
            factors = {".a1.weight": inside.left, ".a2.weight": inside.right}
            parts = {name: factor.reshape(*factor.shape, *ones) for name, factor in factors.items()}
            parts |= _layers_of(added, ".b1.weight", ".b2.weight", ".bm.weight")
            return {**parts, kohya.ALPHA: _number(scale * inside.rank)}
        case Replacement(values, "weight"):
            return {".set_weight": values}
        case Rotation(given, alpha, rescale) | Butterfly(given, alpha, rescale):
            parts = {".oft_blocks": given.to(torch.float32) if given.dtype == torch.float64 else given}
            return {**parts, kohya.ALPHA: _number(alpha), **({} if rescale is None else {".rescale": rescale})}
        case Rescaling(values, of_inputs, offset, "weight"):
            values = values if offset == 1 else (change.factors - 1).float()
            return {".weight": values, ".on_input": torch.tensor(int(of_inputs))}
        case Rescaling():
            raise DataError(
                f"{module}: kohya's and comfy's (IA)³ leaves the bias alone, and this one does not; {REMEDY}"
            )
        case Cut():
            raise DataError(f"{module}: some rows of a LoKr are no LoKr; {RESIZE}")
        case _:
            raise DataError(f"{module}: peft's {type(change).__name__} turns inputs, and kohya's outputs; {REMEDY}")


def _layers_of(product: Product, up: str, down: str, middle: str) -> dict[str, Tensor]:
    """A product as the weights of layers one after another: of convolutions, two of them have a kernel of 1."""
    ones = (1,) * (len(product.shape) - 2)
    parts = {up: product.left.reshape(*product.left.shape, *ones)}
    if product.core is None:
        return {**parts, down: product.right}
    return {**parts, down: product.right.reshape(*product.right.shape, *ones), middle: product.core}


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
                f"({type(change).__name__.lower()}); choose kohya's, or {REMEDY}"
            )
        if isinstance(change, Decomposed):
            if change.magnitude.shape[0] != change.magnitude.numel():
                raise DataError(f"{name}: the diffusers dialect has no word for a DoRA of inputs; choose kohya's")
            kernel = len(inner.shape) == 4
            outputs = change.magnitude.reshape(1, -1, 1, 1) if kernel else change.magnitude.flatten()
            magnitudes[module + ".lora_magnitude_vector.weight"] = outputs
        left, right = inner.product.single
        ones = (1,) * (len(inner.shape) - 2)
        factors[module + A] = right.reshape(-1, *inner.shape[1:])
        factors[module + B] = left.reshape(*left.shape, *ones)
        alphas[module] = inner.scale * inner.rank
        dtypes[module] = dtype or inner.product.left.dtype
    tensors = peft.rename(LoraWeights(factors, alphas))
    cast = {
        name: _cast(tensor, dtype, dtypes[name.removesuffix(A).removesuffix(B)]) for name, tensor in tensors.items()
    }
    return {**cast, **{name: values.to(dtype or values.dtype) for name, values in magnitudes.items()}}


def _cast(values: Tensor, dtype: torch.dtype | None, own: torch.dtype) -> Tensor:
    """In `dtype`; for None in its `own` where that rounds nothing, else as it is."""
    if dtype is not None:
        return values.to(dtype)
    return values.to(own) if torch.equal(values.to(own).to(values.dtype), values) else values


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
