"""A file of adapters, read strictly into what it does to each tensor, and written again.

Every tensor of a file must be understood: what belongs to no known adapter, to no module of the network or to no
complete adapter is an error. Strengths are resolved while reading: alpha is a tensor of the file, or stands in peft's
config, or is the rank where nothing is said.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Parts, Product, Transform
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.generalized import Generalized
from tuner.weights.adapters.hadamard import Hadamard
from tuner.weights.adapters.kronecker import Kronecker
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.peft_config import FILE, PeftConfig, adapters_file
from tuner.weights.adapters.replacement import Replacement
from tuner.weights.adapters.rescaling import Rescaling
from tuner.weights.adapters.rotation import InputButterfly, InputRotation, Rotation
from tuner.weights.adapters.rows import apart
from tuner.weights.embeddings import BUNDLE
from tuner.weights.layouts.modules import COMFY, PEFT, Dialect, Modules, unresolved
from tuner.weights.lora import A, B, LoraWeights
from tuner.weights.store import SafetensorsFile, TensorStore, quote

SHOWN = 5
"""Names in a message; it says how many more there are."""

SUFFIXES: Mapping[str, tuple[str, str]] = {
    ".lora_down.weight": ("lora", "down"),
    ".lora_up.weight": ("lora", "up"),
    ".lora_mid.weight": ("lora", "mid"),
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora_A.default.weight": ("lora", "down"),
    ".lora_B.default.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    "_lora.down.weight": ("lora", "down"),
    "_lora.up.weight": ("lora", "up"),
    ".lora_B.bias": ("lora", "bias"),
    ".lora_B.default.bias": ("lora", "bias"),
    ".alpha": ("", "alpha"),
    ".dora_scale": ("", "magnitude"),
    ".lora_magnitude_vector": ("", "outputs"),
    ".lora_magnitude_vector.weight": ("", "outputs"),
    ".lora_magnitude_vector.default.weight": ("", "outputs"),
    **{f".hada_{part}": ("hada", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": ("lokr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": ("glora", part) for part in ("a1", "a2", "b1", "b2", "bm")},
    ".diff": ("full", "diff"),
    ".set_weight": ("set", "weight"),
    ".w_norm": ("norm", "diff"),
    ".diff_b": ("", "diff_b"),
    ".b_norm": ("norm", "diff_b"),
    ".oft_blocks": ("oft", "blocks"),
    ".rescale": ("oft", "rescale"),
    ".oft_R": ("peft_oft", "rotation"),
    ".oft_R.weight": ("peft_oft", "rotation"),
    ".oft_R.default.weight": ("peft_oft", "rotation"),
    ".boft_R": ("peft_boft", "R"),
    ".boft_R.default": ("peft_boft", "R"),
    ".boft_s": ("peft_boft", "s"),
    ".boft_s.default": ("peft_boft", "s"),
    ".ia3_l": ("peft_ia3", "factors"),
    ".ia3_l.default": ("peft_ia3", "factors"),
    ".on_input": ("ia3", "on_input"),
    ".weight": ("ia3", "weight"),
}
"""What the end of a tensor's name says: the kind of adapter, and which of its tensors this is. Alpha, the magnitude of
DoRA and the difference of a bias go with several kinds."""

XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
"""XLabs' names of a LoRA for Flux: the stream of the pictures is 1, that of the text 2; blocks of one stream have none.
"""

FORMS: Mapping[str, Sequence[set[str]]] = {
    "lora": [{"up", "down"}, {"up", "down", "mid"}, {"up", "down", "bias"}],
    "hada": [{"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}],
    "lokr": [
        {*first, *second}
        for first in ({"w1"}, {"w1_a", "w1_b"})
        for second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ],
    "glora": [{"a1", "a2", "b1", "b2"}, {"a1", "a2", "b1", "b2", "bm"}],
    "full": [{"diff"}],
    "set": [{"weight"}],
    "norm": [{"diff"}, {"diff", "diff_b"}, {"diff_b"}],
    "oft": [{"blocks"}, {"blocks", "rescale"}],
    "peft_oft": [{"rotation"}],
    "peft_boft": [{"R", "s"}],
    "peft_ia3": [{"factors"}],
    "ia3": [{"on_input", "weight"}],
    "": [set()],
}
"""Which tensors of a kind make an adapter."""

SCALED = ("lora", "hada", "lokr", "glora")
"""The kinds that alpha counts for."""

LAYERS: Mapping[str, Callable[[Parts], Difference]] = {
    "lora": LowRank.read,
    "hada": Hadamard.read,
    "lokr": Kronecker.read,
    "full": lambda parts: Full(parts["diff"]),
}


@dataclass(frozen=True)
class Adapters:
    """What one file does: a change by the name of the tensor that it is made to."""

    changes: Mapping[str, Change]
    """By canonical name, such as `unet.conv_in.weight`; where the network is not known, by the file's own spelling."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """The texts of the file's header."""
    dialect: Dialect = "kohya"
    resolved: bool = True
    """Whether the names are canonical."""

    @staticmethod
    def of_lora(lora: LoraWeights) -> "Adapters":
        """A LoRA that is held as factors by module."""
        changes: dict[str, Change] = {}
        for module in lora.modules:
            product = Product(lora.tensors[module + B].flatten(1), lora.tensors[module + A])
            changes[f"{module}.weight"] = LowRank(product, lora.alphas[module] / product.rank)
        return Adapters(changes)

    def as_lora(self) -> LoraWeights | None:
        """The inverse of `of_lora`; None where something is more than two factors beside a weight."""
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, float] = {}
        for name, change in self.changes.items():
            if not isinstance(change, LowRank) or change.slot != "weight" or change.product.core is not None:
                return None
            module, left, right = name.removesuffix(".weight"), change.product.left, change.product.right
            tensors[module + A] = right
            tensors[module + B] = left.reshape(*left.shape, *(1,) * (right.ndim - 2))
            alphas[module] = change.scale * change.rank
        return LoraWeights(tensors, alphas)

    @property
    def linear(self) -> bool:
        """Whether every change is something added, whatever the weights are."""
        return all(isinstance(change, Difference) for change in self.changes.values())


def read_adapters(path: Path, modules: Modules | None = None, alpha: float | None = None) -> Adapters:
    """The adapters in the file at `path`, or in peft's folder.

    Args:
        path: a `.safetensors` file, or a folder with an `adapter_model.safetensors`.
        modules: those of the network. None: names stay as the file spells them, which is enough where only files of one
            dialect are worked on.
        alpha: for a file of peft's that is not accompanied by its config.

    Raises:
        DataError: anything in the file that is not understood, not complete or not finite; the message names it.
    """
    path = adapters_file(Path(path).expanduser())
    store = SafetensorsFile(path)
    config = PeftConfig.find(path, store.metadata, store.metas)
    return parse_adapters(store, modules, metadata=store.metadata, config=config, alpha=alpha, place=str(path))


def parse_adapters(
    store: TensorStore,
    modules: Modules | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    config: PeftConfig | None = None,
    alpha: float | None = None,
    place: str = "adapters",
) -> Adapters:
    """The adapters that the tensors of `store` are; see `read_adapters`.

    Raises:
        DataError: anything that is not understood, not complete or not finite.
    """
    dialect = dialect_of(store.metas)
    groups = _groups(store, place)
    names = _resolve(groups, modules, place)
    own = config if dialect == "diffusers" else None
    if own is None and alpha is None and any(name.startswith(PEFT) for name in store.metas):
        scaled = [group for group in groups.values() if any(kind in SCALED for kind, _ in group)]
        if not all(("", "alpha") in group for group in scaled):
            raise DataError(f"{place}: says no alpha; put its {FILE} beside it, or give alpha")
    changes: dict[str, Change] = {}
    wrong: list[str] = []
    for spelling, parts in groups.items():
        try:
            for change in _changes(spelling, parts, own, alpha):
                for name, part in _placed(names[spelling], change, modules):
                    if name in changes:
                        raise DataError(f"{name}: is in another layer of the file too; do not use it")
                    changes[name] = part
        except DataError as error:
            wrong.append(f"{quote(spelling)} ({error})")
    if wrong:
        _refuse(
            place,
            "not a whole adapter",
            wrong,
            "download it again; if that does not help, it is of a kind that is not read",
        )
    return Adapters(changes, metadata or {}, dialect, modules is not None)


def _placed(module: str, change: Change, modules: Modules | None) -> Iterator[tuple[str, Change]]:
    """The tensors that are changed, and how: of a single file's layer that holds rows of several, those that it holds.

    What is done to a tensor only where it is there is left out where it is known that it is not.
    """
    rows = modules.rows(module) if modules is not None else None
    for name, part in ({module: change} if rows is None else apart(change, rows)).items():
        tensor = f"{name}.{change.slot}"
        optional = isinstance(part, Transform) and part.optional
        if not (optional and modules is not None and modules.tensors and tensor not in modules.tensors):
            yield tensor, part


Group = dict[tuple[str, str], Tensor]
"""The tensors of one module, by the kind of adapter and what they are."""


def _groups(store: TensorStore, place: str) -> dict[str, Group]:
    """The file's tensors by the spelling of their module."""
    if not store.metas:
        raise DataError(f"{place}: holds no tensors; download it again")
    groups: dict[str, Group] = {}
    unknown: list[str] = []
    twice: list[str] = []
    broken: list[str] = []
    for name in store.metas:
        spelling, entry = split(name)
        if entry is None:
            unknown.append(quote(name))
            continue
        group = groups.setdefault(spelling, {})
        if entry in group:
            twice.append(quote(name))
        group[entry] = store.read(name)
        if entry != ("ia3", "on_input") and not _usable(group[entry]):
            broken.append(quote(name))
    unknown += [
        quote(f"{spelling}.weight")
        for spelling, group in groups.items()
        if ("ia3", "weight") in group and len(group) == 1
    ]
    if words := [quote(name) for name in store.metas if name.startswith(f"{BUNDLE}.")]:
        _refuse(place, "new words, not layers", words, "give the LoRA's own file, and the words as embeddings")
    if unknown:
        _refuse(place, "no part of an adapter that is known", unknown, "is it a LoRA, and a whole checkpoint is not?")
    if twice:
        _refuse(place, "said twice in two ways", twice, "do not use this file")
    if broken:
        _refuse(place, "holding NaN, infinity, nothing, or no floating-point numbers", broken, "use another copy")
    return groups


def split(name: str) -> tuple[str, tuple[str, str] | None]:
    """A tensor's name as the spelling of its module and what it is of it; None when that is not known."""
    if xlabs := XLABS.fullmatch(name):
        stream, number, layer, side, part = xlabs.groups()
        if (stream == "double") != bool(side):
            return name, None
        own = {"1": f"img_attn.{layer}", "2": f"txt_attn.{layer}"}.get(side, {"qkv": "qkv", "proj": "linear2"}[layer])
        return f"{stream}_blocks.{number}.{own}", ("lora", part)
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")
    if not suffix or len(suffix) == len(name):
        return name, None
    spelling = name.removesuffix(suffix)
    if suffix.startswith("_lora."):  # diffusers up to 0.17: attn1.processor.to_q_lora.down.weight
        if ".processor.to_" not in spelling:
            return name, None
        spelling = spelling.replace(".processor.to_", ".to_")
        spelling += ".0" if spelling.endswith(".to_out") else ""
    return spelling, SUFFIXES[suffix]


def _usable(values: Tensor) -> bool:
    if not values.is_floating_point() or not values.numel():
        return False
    return bool(torch.isfinite(values.float() if values.dtype.itemsize == 1 else values).all())


def _resolve(spellings: Iterable[str], modules: Modules | None, place: str) -> dict[str, str]:
    """The name of the module of each spelling."""
    names: dict[str, str] = {}
    lost: list[str] = []
    taken: dict[str, str] = {}
    for spelling in spellings:
        try:
            name = unresolved(spelling) if modules is None else modules.find(spelling)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if name is None:
            lost.append(quote(spelling))
            continue
        if name in taken:
            raise DataError(f"{place}: {quote(spelling)} and {quote(taken[name])} are one module; do not use this file")
        names[spelling] = name
        taken[name] = spelling
    if lost:
        remedy = "it is for another model, or for more than this one has: 'tuner translate drop=…' leaves that out"
        _refuse(place, "of its modules are not in the network", lost, remedy)
    return names


def _changes(spelling: str, group: Group, config: PeftConfig | None, alpha: float | None) -> list[Change]:
    """What is done to the tensors of one module."""
    kinds = sorted({kind for kind, _ in group if kind})
    if len(kinds) > 1:
        raise DataError(f"of the kinds {' and '.join(kinds)} at once")
    kind = kinds[0] if kinds else ""
    own = {part: tensor for (owner, part), tensor in group.items() if owner}
    common = {part: tensor for (owner, part), tensor in group.items() if not owner}
    if set(own) not in FORMS[kind]:
        whole = min(FORMS[kind], key=lambda form: len(form ^ set(own)))
        lacks, extra = sorted(whole - set(own)), sorted(set(own) - whole)
        raise DataError(f"lacks {' and '.join(lacks)}" if lacks else f"has {' and '.join(extra)} too many")
    settings = config.of(spelling) if config is not None else None
    parts = Parts(own, _alpha(common.pop("alpha", None), settings, alpha), settings)
    changes: list[Change] = []
    if "diff_b" in common:
        changes.append(Full(common.pop("diff_b"), "bias"))
    if kind in LAYERS:
        layer = LAYERS[kind](parts)
        if "magnitude" in common:
            changes.append(Decomposed(layer, common.pop("magnitude")))
        elif "outputs" in common:
            changes.append(Decomposed(layer, common.pop("outputs").flatten()))
        else:
            changes.append(layer)
    match kind:
        case "lora" if "bias" in own:
            low_rank = LowRank.read(parts)
            changes.append(Full(low_rank.scale * own["bias"].double(), "bias"))
        case "glora":
            changes.append(Generalized.read(parts))
        case "set":
            changes.append(Replacement(own["weight"]))
        case "norm":
            changes += [Full(values, "weight" if part == "diff" else "bias", norm=True) for part, values in own.items()]
        case "oft":
            changes.append(Rotation.read(parts))
        case "peft_oft":
            changes.append(InputRotation.read(parts))
        case "peft_boft":
            changes.append(InputButterfly.read(parts))
        case "peft_ia3":
            changes += _peft_ia3(parts, spelling)
        case "ia3":
            changes.append(Rescaling(parts["weight"], bool(parts["on_input"].item()), 1.0))
        case _:
            pass
    if common or not changes:
        raise DataError(f"has {' and '.join(sorted(common)) or 'alpha'} without what it belongs to")
    return changes


def _alpha(said: Tensor | None, settings: Mapping[str, object] | None, default: float | None) -> float | None:
    """The number that a product's rank is compared with; None when nothing says it."""
    if said is not None:
        if said.numel() != 1:
            raise DataError(f"alpha of shape {list(said.shape)}, expected one number")
        return float(said)
    found = settings.get("alpha") if settings is not None else None
    if isinstance(found, (int, float)) and not math.isfinite(found):
        raise DataError(f"alpha is {found}, expected a number")
    return float(found) if isinstance(found, (int, float)) else default


def _peft_ia3(parts: Parts, spelling: str) -> list[Change]:
    """peft's factors: `[out, 1]` or `[1, in]`; of convolutions `[1, n, 1, 1]`, which is told by the config."""
    factors = parts["factors"]
    if factors.ndim not in (2, 4) or max(factors.shape) != factors.numel():
        raise DataError(f"factors of shape {list(factors.shape)}, expected one for each output or input")
    of_inputs = factors.shape[1] == factors.numel() and factors.numel() > 1
    if factors.ndim == 4 or factors.numel() == 1:
        if parts.settings is None or not isinstance(parts.settings.get("feedforward_modules"), list):
            raise DataError(
                f"without its {FILE} it is not known whether inputs or outputs are meant; put that beside it"
            )
        named = [str(name) for name in parts.settings["feedforward_modules"]]  # pyright: ignore
        of_inputs = any(spelling == name or spelling.endswith(f".{name}") for name in named)
    flat = factors if factors.ndim == 4 else factors.flatten()
    weight = Rescaling(flat, of_inputs, 0.0)
    return [weight] if of_inputs else [weight, Rescaling(flat, False, 0.0, "bias", optional=True)]


def dialect_of(names: Iterable[str]) -> Dialect:
    """Whose names these are, told from how they start."""
    names = list(names)
    if any(name.startswith(("lora_", "lycoris_", "oft_")) for name in names):
        return "kohya"
    if any(name.startswith(tuple(COMFY.values())) for name in names):
        return "comfy"
    return "diffusers"


def _refuse(place: str, what: str, names: Sequence[str], remedy: str) -> Never:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise DataError(f"{place}: {len(names)} {what}: {', '.join(names[:SHOWN])}{more}; {remedy}")
