"""What a model is: a checkpoint, a LoRA or a folder, told from headers alone.

What a header says may come from anybody: texts are shown without what would steer a terminal, and cut.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from merge.blocks import Blocks
from merge.provenance import Ancestor, Ancestry, find, tree
from merge.provenance import lines as tree_lines
from tuner.errors import DataError
from tuner.weights.adapters.outline import Outline, outline
from tuner.weights.adapters.peft_config import adapters_file
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_files
from tuner.weights.convert import lacking
from tuner.weights.folder import DiffusersFolder
from tuner.weights.fp8 import SCALES
from tuner.weights.modelspec import TRAINING
from tuner.weights.store import SafetensorsFile, ShardedFile, TensorMeta, TensorStore

TAGS = "ss_tag_frequency"
NAMES = {"ldm": "those of the original single files", "diffusers": "diffusers'"}
"""Whose names a checkpoint has, by layout."""
LONGEST = 100
"""Characters of a text that are shown."""
ACROSS = 4
"""Blocks in a line."""
TAGS_SHOWN = 8


@dataclass(frozen=True)
class Amount:
    """How much there is of something."""

    tensors: int = 0
    parameters: int = 0
    """Numbers of a kind that is trained; counters and positions are none."""
    bytes: int = 0

    @staticmethod
    def of(metas: Sequence[TensorMeta]) -> "Amount":
        """That of some tensors."""
        floats = [meta for meta in metas if meta.dtype.is_floating_point]
        return Amount(len(metas), sum(prod(meta.shape) for meta in floats), sum(meta.bytes for meta in metas))


@dataclass(frozen=True)
class Description:
    """What is known of a model."""

    name: str
    title: str
    """What it is, in words."""
    family: str | None
    purpose: str
    layout: str | None
    """Whose names the tensors have."""
    prediction: str | None
    """`v` where the file says so."""
    files: int
    total: Amount
    dtypes: Mapping[str, Amount]
    lacks: str | None
    """What is missing of a released model of these sizes, or which tensor none of its kind has; None where it is whole.
    """
    scaled: int
    """How many weights are 8-bit numbers with a scale beside them."""
    components: Mapping[str, Amount]
    blocks: Mapping[str, Amount]
    """Those that recipes can give numbers for; of a checkpoint."""
    adapters: Outline | None
    """Of a LoRA or its like."""
    metadata: Mapping[str, str]
    """The texts of the header; of a folder, those of the first file that has any."""
    ancestors: Ancestor | None
    """Of a merged model: itself, with what it was made of."""

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def describe(path: Path) -> Description:
    """What the model at `path` is: a file, an index of shards, a diffusers folder, or peft's folder of a LoRA.

    Raises:
        DataError: missing, damaged, or no model.
        UnsafeError: a pickle.
    """
    path = adapters_file(path.expanduser())
    store = open_files(path)
    known = identify(store.metas)
    metadata = _metadata(store)
    ancestry: Ancestry | None = find(metadata)
    blocks = Blocks.of(store.metas)
    by_block = _amounts(store, blocks.block)
    return Description(
        name=path.name,
        title=str(known),
        family=known.family,
        purpose=known.purpose,
        layout=known.layout,
        prediction=known.prediction,
        files=len({place.path for name in store.metas if (place := store.locate(name)) is not None}),
        total=Amount.of(list(store.metas.values())),
        dtypes=_amounts(store, lambda name: str(store.metas[name].dtype).removeprefix("torch.")),
        lacks=_lacking(store),
        scaled=sum(name.endswith(SCALES) for name in store.metas),
        components={} if known.lora else _amounts(store, lambda name: known.component(name) or "other"),
        blocks={} if known.lora else {label: by_block[label] for label in blocks.names if label in by_block},
        adapters=outline(path) if known.lora and isinstance(store, SafetensorsFile) else None,
        metadata=metadata,
        ancestors=tree(ancestry, path.name) if ancestry is not None else None,
    )


def _lacking(store: TensorStore) -> str | None:
    try:
        return lacking(store)
    except DataError as error:
        return str(error)


def _metadata(store: TensorStore) -> Mapping[str, str]:
    match store:
        case SafetensorsFile():
            return store.metadata
        case DiffusersFolder():
            found = [_metadata(part) for part in store.components.values()]
        case ShardedFile():
            paths = sorted({store.locate(name).path for name in store.metas})
            found = [SafetensorsFile(path).metadata for path in paths]
        case _:
            found = []
    return next((texts for texts in found if set(texts) - {"format"}), {})


def _amounts(store: TensorStore, label: Callable[[str], str | None]) -> dict[str, Amount]:
    """How much there is of each label, in the order of the file; tensors without one are left out."""
    groups: dict[str, list[TensorMeta]] = {}
    for name, meta in store.metas.items():
        found = label(name)
        if found is not None:
            groups.setdefault(found, []).append(meta)
    return {found: Amount.of(metas) for found, metas in groups.items()}


def lines(found: Description) -> Iterator[str]:
    """A description as text."""
    yield f"{plain(found.name)}: {found.title}"
    facts = {
        "names": NAMES.get(found.layout or "", "") if found.adapters is None else "",
        "predicts": found.prediction or "",
        "size": _size(found),
        "dtypes": _counted({dtype: amount.tensors for dtype, amount in found.dtypes.items()}),
        "lacks": plain(found.lacks or "", 200),
        "scaled": f"{found.scaled} weights of 8 bits have a scale beside them" if found.scaled else "",
        **(_adapters(found.adapters) if found.adapters is not None else {}),
    }
    yield from _aligned({key: text for key, text in facts.items() if text})
    yield from (f"  fault: {plain(fault, 400)}" for fault in (found.adapters.faults if found.adapters else ()))
    if found.components:
        yield ""
        yield from _table(found.components)
    if found.blocks:
        yield ""
        yield "parameters by block"
        yield from _in_columns([f"{label:<5}{_short(amount.parameters):>8}" for label, amount in found.blocks.items()])
    if found.ancestors is not None:
        yield ""
        yield "made of"
        yield from (f"  {plain(line)}" for line in tree_lines(found.ancestors))
    if texts := dict(_texts(found.metadata)):
        yield ""
        yield "header"
        yield from _aligned(texts)


def _size(found: Description) -> str:
    files = f" in {found.files} files" if found.files > 1 else ""
    total = found.total
    return f"{_bytes(total.bytes)}{files}, {total.tensors:,} tensors, {total.parameters:,} parameters"


def _counted(counts: Mapping[Any, int]) -> str:
    """The most frequent first; without its number where there is but one."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    some = ", ".join(f"{key} ({count})" for key, count in ranked[:ACROSS])
    return some + (f" and {len(counts) - ACROSS} more" if len(counts) > ACROSS else "")


def _adapters(adapters: Outline) -> Mapping[str, str]:
    parts = ", ".join(f"{count} of {name}" for name, count in adapters.components.items())
    return {
        "dialect": adapters.dialect,
        "layers": f"{adapters.layers}: {parts}",
        "kinds": _counted(adapters.kinds),
        "rank": _counted(adapters.ranks),
        "alpha": _counted(adapters.alphas),
    }


def _texts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What a header says, the long and the many of it in short."""
    own = [key for key in metadata if key.startswith("ss_")]
    for key, text in metadata.items():
        if key not in own and not key.startswith("merge.") and (key, text) != ("format", "pt"):
            yield plain(key), plain(_picture(text) or text)
    if own:
        usual = {key: metadata[f"ss_{key}"] for key in TRAINING if f"ss_{key}" in metadata}
        for key, text in usual.items():
            if text not in ("None", "{}", ""):
                yield f"ss_{key}", plain(text)
        if tags := _tags(metadata.get(TAGS, "")):
            yield TAGS, plain(tags)
        if more := len(own) - len(usual) - (TAGS in metadata):
            yield "ss_ …", f"{more} more (all: --json)"


def _picture(text: str) -> str:
    """Of a picture in a header (`data:image/jpeg;base64,…`) how large it is; nothing of other texts."""
    kind, _, content = text.partition(";base64,")
    return f"{kind.removeprefix('data:')}, {_bytes(len(content) * 3 // 4)}" if kind.startswith("data:image/") else ""


def _tags(text: str) -> str:
    """The words that a LoRA was trained on most, from `{folder: {tag: count}}`; nothing where `text` is not that."""
    try:
        folders = cast("dict[str, dict[str, int]]", json.loads(text))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag: int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""
    some = ", ".join(f"{tag.strip()} {count}" for tag, count in counts.most_common(TAGS_SHOWN))
    return some + (f" and {len(counts) - TAGS_SHOWN} more" if len(counts) > TAGS_SHOWN else "")


def _table(components: Mapping[str, Amount]) -> Iterator[str]:
    width = max(map(len, ["component", *components]))
    yield f"  {'component':<{width}}{'tensors':>10}{'parameters':>17}{'size':>12}"
    for name, amount in components.items():
        yield f"  {name:<{width}}{amount.tensors:>10,}{amount.parameters:>17,}{_bytes(amount.bytes):>12}"


def _in_columns(cells: Sequence[str]) -> Iterator[str]:
    rows = -(-len(cells) // ACROSS)
    for row in range(rows):
        yield "  " + "    ".join(cells[row::rows])


def _aligned(facts: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for key, text in facts.items():
        yield f"  {key:<{width}}  {text}"


def plain(text: str, longest: int = LONGEST) -> str:
    """`text` in one line, without what would steer a terminal."""
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return line if len(line) <= longest else f"{line[:longest]}…"


def _short(number: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} bytes"
