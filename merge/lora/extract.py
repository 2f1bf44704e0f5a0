"""A LoRA out of two checkpoints: what a fine-tune changed, in as few directions as are asked for.

Tensors are read one at a time. Of every layer the error is known exactly, in the norm of its change
(`merge.lora.decomposition`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from merge.lora.decomposition import Decomposition, decompose
from merge.lora.ranks.base import Layer, RankRule
from merge.lora.ranks.budget import Budget
from tuner.errors import ConfigError, DataError
from tuner.weights.adapters.base import Change
from tuner.weights.adapters.file import SHOWN, Adapters
from tuner.weights.adapters.full import Full
from tuner.weights.layouts.modules import Dialect, Modules
from tuner.weights.modelspec import cut, public
from tuner.weights.store import TensorStore

EMBEDDINGS = (
    *("*token_embedding.weight", "*position_embedding.weight"),
    *("*.shared.weight", "*relative_attention_bias.weight"),
)
"""Tables of vectors: of the shape of a layer, and none that a LoRA is read for."""
NAME_BYTES = 150
"""What a tensor's entry in the header takes up at most, beside the canonical name of its module."""
HEADER_BYTES = 8192
"""For everything in a header that is not about one tensor."""


@dataclass(frozen=True)
class Part:
    """One tensor of the result."""

    name: str
    rank: int | None
    """None: the whole difference is kept."""
    norm: float
    """‖ΔW‖, the Frobenius norm of what the fine-tune changed."""
    error: float
    """‖ΔW - kept‖ / ‖ΔW‖, exactly, before rounding to the file's dtype."""


@dataclass(frozen=True)
class Extraction:
    """What was found."""

    adapters: Adapters
    parts: tuple[Part, ...]
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Changed tensors that the file does not tell of, and why."""
    unchanged: int = 0
    """Tensors that are equal in both."""

    @property
    def error(self) -> float:
        """‖ΔW - kept‖ / ‖ΔW‖ over all tensors of the result together."""
        return overall(self.parts)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What goes into a LoRA."""

    dialect: Dialect = "kohya"
    keep: tuple[str, ...] = ("*",)
    """Patterns of tensor names with `*` and `?`."""
    drop: tuple[str, ...] = ()
    """Patterns of names that are left out."""
    vectors: bool = True
    """Whether norms and biases are told of too, which the diffusers dialect has no words for."""
    dtype: torch.dtype = torch.float16
    seed: int = 0

    def why_not(self, name: str, shape: tuple[int, ...], modules: Modules) -> str | None:
        """Why the tensor `name` is not told of; None where it is."""
        module, _, slot = name.rpartition(".")
        if not any(fnmatchcase(name, pattern) for pattern in self.keep) or any(
            fnmatchcase(name, pattern) for pattern in self.drop
        ):
            return "not wanted"
        if slot not in ("weight", "bias") or (slot == "bias" and len(shape) != 1):
            return "neither a weight nor a bias"
        if any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS):
            return "an embedding"
        if len(shape) not in (1, 2, 4):
            return f"of {len(shape)} dimensions"
        if len(shape) == 1 and not self.vectors:
            return "norms and biases are not wanted"
        if len(shape) == 1 and self.dialect == "diffusers":
            return "the diffusers dialect has no word for norms and biases"
        try:
            modules.spell(module, self.dialect)
        except DataError:
            return f"the {self.dialect} dialect has no word for it"
        return None


def extract(
    base: TensorStore,
    tuned: TensorStore,
    rule: RankRule,
    wanted: Wanted,
    modules: Modules | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> Extraction:
    """What has to be added to `base` to come near `tuned`.

    Args:
        base: a checkpoint.
        tuned: one of the same tensors.
        rule: how many directions of each layer are kept.
        wanted: of which tensors.
        modules: the network's; those that `base` has where left out.
        progress: told the name of each tensor that has been read.

    Raises:
        ConfigError: a rule that the dialect has no use for.
        DataError: the checkpoints are of different networks, hold NaN or infinity, or are equal.
    """
    refuse_padding(rule, wanted.dialect, base.metas)
    _same_network(base, tuned)
    modules = modules or Modules.of_tensors(base.metas)
    vectors: dict[str, Full] = {}
    found: dict[str, Decomposition] = {}
    left_out: dict[str, str] = {}
    norms: dict[str, float] = {}
    unchanged = 0
    for name, meta in base.metas.items():
        difference = _difference(base, tuned, name) if meta.dtype.is_floating_point else None
        progress(name)
        if difference is None:
            unchanged += 1
            continue
        why = wanted.why_not(name, meta.shape, modules)
        if why is not None:
            left_out[name] = why
        elif len(meta.shape) == 1:
            norm = len(base.metas[name.rpartition(".")[0] + ".weight"].shape) == 1
            slot = "weight" if name.endswith(".weight") else "bias"
            norms[name] = difference.square().sum().sqrt().item()
            vectors[name] = Full(difference.float(), slot, norm)
        else:
            found[name] = decompose(difference.flatten(1), rule.most, wanted.seed, name)
            norms[name] = found[name].total ** 0.5
    return _chosen(base, rule, wanted, found, vectors, norms, left_out, unchanged)


def foreseen(
    base: TensorStore, tuned: TensorStore, wanted: Wanted, modules: Modules
) -> tuple[int, int, dict[str, str]]:
    """What `extract` would tell of where it differs, from headers alone.

    Returns: how many layers, how many norms and biases, and which tensors are left out, with the reason.

    Raises:
        DataError: the checkpoints are of different networks.
    """
    _same_network(base, tuned)
    left_out: dict[str, str] = {}
    counts = {1: 0, 2: 0}
    for name, meta in base.metas.items():
        if meta.dtype.is_floating_point:
            why = wanted.why_not(name, meta.shape, modules)
            if why is not None:
                left_out[name] = why
            else:
                counts[min(len(meta.shape), 2)] += 1
    return counts[2], counts[1], left_out


def _chosen(
    base: TensorStore,
    rule: RankRule,
    wanted: Wanted,
    found: Mapping[str, Decomposition],
    vectors: Mapping[str, Full],
    norms: Mapping[str, float],
    left_out: dict[str, str],
    unchanged: int,
) -> Extraction:
    """The result, with the directions that the rule chooses."""
    layers = {name: layer_of(name, one, base.metas[name].shape, wanted.dtype) for name, one in found.items()}
    ranks = rule.choose(layers, HEADER_BYTES + bytes_of(vectors, wanted.dtype))
    changes: dict[str, Change] = dict(vectors)
    parts = [Part(name, None, norms[name], 0.0) for name in vectors]
    for name, one in found.items():
        if ranks[name]:
            changes[name] = one.low_rank(ranks[name], base.metas[name].shape)
            parts.append(Part(name, ranks[name], norms[name], one.error(ranks[name])))
        else:
            left_out[name] = "the rule keeps nothing of it"
    if not changes:
        reasons = "; ".join(dict.fromkeys(left_out.values())) or "the checkpoints are equal"
        raise DataError(f"there is nothing to extract: {reasons}")
    return Extraction(Adapters(changes, {}, wanted.dialect), tuple(parts), left_out, unchanged)


def refuse_padding(rule: RankRule, dialect: Dialect, names: Iterable[str]) -> None:
    """Refuse to count bytes where every layer gets the rank of the largest, or several layers are one in the file.

    Raises:
        ConfigError: a budget, and diffusers' names or a transformer's tensors among `names`.
    """
    if dialect == "diffusers" and isinstance(rule, Budget):
        raise ConfigError("rank: a budget has no use where all layers have one rank; choose dialect = 'kohya'")
    if isinstance(rule, Budget) and any(name.startswith("transformer.") for name in names):
        raise ConfigError("rank: a budget cannot be kept where several layers are one in the file; choose another rule")


def overall(parts: Sequence[Part]) -> float:
    """The error of all tensors together, relative to the norm of all."""
    total = sum(part.norm**2 for part in parts)
    return (sum((part.error * part.norm) ** 2 for part in parts) / total) ** 0.5 if total else 0.0


def layer_of(name: str, one: Decomposition, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    """What a rule has to know of the weight `name` of `shape`, in a file of `dtype`."""
    kernel = prod(shape[2:]) > 1
    once = 3 * (len(name) + NAME_BYTES) + 4  # two factors and alpha
    return Layer(one.values, one.rest, kernel, (shape[0] + prod(shape[1:])) * dtype.itemsize, once)


def bytes_of(vectors: Mapping[str, Full], dtype: torch.dtype) -> int:
    """What whole differences take up in a file of `dtype`; those of norms and biases are float32."""
    return sum(
        vector.values.numel() * (4 if vector.values.ndim == 1 else dtype.itemsize) + len(name) + NAME_BYTES
        for name, vector in vectors.items()
    )


def header_bytes(source: Mapping[str, str]) -> int:
    """What a header takes up beside its tensors' entries, at most, where texts of the header `source` may be kept."""
    return HEADER_BYTES + sum(len(json.dumps([key, cut(key, text)])) for key, text in public(source).items())


def _difference(base: TensorStore, tuned: TensorStore, name: str) -> Tensor | None:
    """tuned - base, float64; None where they are equal."""
    old, new = base.read(name), tuned.read(name)
    if old.dtype == new.dtype and torch.equal(old, new):
        return None
    difference = new.double() - old.double()
    if not torch.isfinite(difference).all():
        raise DataError(f"{name}: holds NaN or infinity; use another copy of the checkpoint")
    return difference if difference.any() else None


def _same_network(base: TensorStore, tuned: TensorStore) -> None:
    for one, other, who in ((base, tuned, "the tuned checkpoint"), (tuned, base, "the base")):
        if lost := [name for name in one.metas if name not in other.metas]:
            more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
            raise DataError(
                f"{who} lacks {', '.join(lost[:SHOWN])}{more}; give two checkpoints of one network and layout"
            )
    wrong = [name for name, meta in base.metas.items() if tuned.metas[name].shape != meta.shape]
    if wrong:
        shapes = f"{list(base.metas[wrong[0]].shape)} and {list(tuned.metas[wrong[0]].shape)}"
        raise DataError(
            f"the checkpoints differ in the shape of {len(wrong)} tensors: {wrong[0]} ({shapes}) …; "
            "give two checkpoints of one network"
        )
