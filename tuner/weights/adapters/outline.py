"""What kinds of adapters a file holds, told from its header; of the values only the single numbers, alphas, are read.

Nothing is refused here: what is not understood is said. Whoever wants to use a file reads it with `read_adapters`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DataError
from tuner.weights.adapters.file import FORMS, SCALED, dialect_of, split
from tuner.weights.adapters.peft_config import FILE, PeftConfig
from tuner.weights.architecture import FOLDERS
from tuner.weights.layouts.modules import COMFY, KOHYA, PEFT, Dialect
from tuner.weights.store import SafetensorsFile, quote

WORDS: Mapping[str, str] = {
    "lora": "LoRA",
    "hada": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "full": "whole difference",
    "set": "whole weight",
    "norm": "difference of a norm",
    "oft": "OFT",
    "peft_oft": "OFT",
    "peft_boft": "BOFT",
    "ia3": "(IA)³",
    "peft_ia3": "(IA)³",
    "": "difference of a bias",
}
"""What a kind of adapter is called."""

RANKED: Mapping[str, tuple[str, ...]] = {"lora": ("down",), "hada": ("w1_b",), "lokr": ("w2_b", "w1_b")}
"""Which tensor of a kind has as many rows as the adapter has directions."""

NOT_SAID = "that of the rank"
"""Of an alpha that is not said: a product is multiplied by 1."""
SHOWN = 5


@dataclass(frozen=True)
class Outline:
    """Counts of layers; most frequent first."""

    dialect: Dialect
    layers: int
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    components: Mapping[str, int]
    faults: tuple[str, ...]
    """Why the file cannot be used as it is, as far as the header tells."""


def outline(path: Path) -> Outline:
    """What the adapters in the file at `path` are.

    Raises:
        DataError: it is no whole safetensors file.
    """
    store = SafetensorsFile(path)
    groups: dict[str, dict[tuple[str, str], str]] = {}
    unknown: list[str] = []
    for name in store.metas:
        spelling, entry = split(name)
        if entry is None:
            unknown.append(quote(name))
        else:
            groups.setdefault(spelling, {})[entry] = name
    faults: list[str] = []
    if unknown:
        faults.append(f"no part of an adapter that is known: {_some(unknown)}")
    dialect = dialect_of(store.metas)
    config: PeftConfig | None = None
    try:
        config = PeftConfig.find(path, store.metadata, store.metas) if dialect == "diffusers" else None
    except DataError as error:
        faults.append(str(error))
    kinds, ranks, alphas = Counter[str](), Counter[int](), Counter[str]()
    broken: list[str] = []
    for spelling, group in groups.items():
        found = sorted({kind for kind, _ in group if kind})
        kind = found[0] if found else ""
        own = {part for owner, part in group if owner}
        if len(found) > 1 or own not in FORMS[kind] or (not own and ("", "diff_b") not in group):
            broken.append(quote(spelling))
            continue
        kinds[_word(store, group, kind)] += 1
        sized = next((group[kind, part] for part in RANKED.get(kind, ()) if (kind, part) in group), None)
        if sized is not None and store.metas[sized].shape:
            ranks[store.metas[sized].shape[0]] += 1
        if kind in SCALED:
            alphas[_alpha(store, group, spelling, config)] += 1
    if broken:
        faults.append(f"not whole, or of several kinds at once: {_some(broken)}")
    if config is None and any(name.startswith(PEFT) for name in store.metas) and NOT_SAID in alphas:
        faults.append(f"says no alpha, and its {FILE} is not beside it")
    return Outline(
        dialect,
        len(groups),
        dict(kinds.most_common()),
        dict(ranks.most_common()),
        dict(alphas.most_common()),
        dict(Counter(map(component, groups)).most_common()),
        tuple(faults),
    )


def component(spelling: str) -> str:
    """The component that a module is of, as far as its spelling tells; `unet` also stands for a transformer."""
    plain = spelling.removeprefix(PEFT)
    for name, prefixes in KOHYA.items():
        if plain.startswith((*prefixes, *(prefix.replace("lora_", "oft_") for prefix in prefixes))):
            return name
    for name, prefix in COMFY.items():
        if plain.startswith(prefix):
            return name
    first = plain.partition(".")[0]
    return first if first in FOLDERS else "not said"


def _word(store: SafetensorsFile, group: Mapping[tuple[str, str], str], kind: str) -> str:
    if ("", "magnitude") in group or ("", "outputs") in group:
        return "DoRA" if kind == "lora" else f"{WORDS[kind]} with magnitudes"
    if kind == "oft" and len(store.metas[group["oft", "blocks"]].shape) == 4:
        return "BOFT"
    return WORDS[kind]


def _alpha(
    store: SafetensorsFile, group: Mapping[tuple[str, str], str], spelling: str, config: PeftConfig | None
) -> str:
    if ("", "alpha") in group:
        name = group["", "alpha"]
        return f"{store.read(name).item():g}" if store.metas[name].shape in ((), (1,)) else "not one number"
    try:
        settings = config.of(spelling) if config is not None else None
    except DataError:
        return "not understood"
    said = settings.get("alpha") if settings is not None else None
    return f"{said:g}" if isinstance(said, (int, float)) else NOT_SAID


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
