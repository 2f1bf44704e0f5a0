"""Where a merged file comes from, in its own header: the recipe, what it was made of, and what that was made of.

| key               | text                                                                                     |
|-------------------|------------------------------------------------------------------------------------------|
| `merge.recipe`    | JSON: steps, numbers and settings; models by the names that the recipe gives them        |
| `merge.sources`   | JSON, for each model: name, content hash of what was used, hash of its names and shapes  |
| `merge.root`      | the content hash of this file's tensors                                                  |
| `merge.ancestors` | JSON: recipe and sources of every merged file among the sources, by its content hash     |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from merge.content import table
from merge.plan import Plan
from merge.recipe import Source
from tuner.errors import DataError
from tuner.weights.store import SafetensorsFile

VERSION = "1"
MAX_ANCESTORS_BYTES = 500_000
"""Older generations are left out beyond this."""
KEPT = (
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.resolution",
    "modelspec.prediction_type",
    "modelspec.encoder_layer",
)
"""What a merged file has in common with its first source."""


@dataclass(frozen=True)
class Origin:
    """A model that a merged file was made of."""

    name: str
    root: str
    """The content hash of what was read of it."""
    table: str
    """The hash of its tensors' names, dtypes and shapes."""


@dataclass(frozen=True)
class Ancestry:
    """What a merged file says of itself."""

    recipe: Mapping[str, Any]
    sources: tuple[Origin, ...]
    root: str
    ancestors: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def of(path: Path) -> "Ancestry":
        """That of a file.

        Raises:
            DataError: it was not made by a merge of this program, or its header was changed.
        """
        ancestry = find(SafetensorsFile(path).metadata)
        if ancestry is None:
            raise DataError(f"{path}: its header holds no recipe; it was not made by 'tuner merge'")
        return ancestry


def find(metadata: Mapping[str, str]) -> Ancestry | None:
    """What a header says; None when it is not of a merged file."""
    try:
        recipe = json.loads(metadata["merge.recipe"])
        sources = json.loads(metadata["merge.sources"])
        older = json.loads(metadata.get("merge.ancestors", "{}"))
        return Ancestry(
            cast("dict[str, Any]", recipe),
            tuple(Origin(source["name"], source["root"], source["table"]) for source in sources),
            metadata["merge.root"],
            cast("dict[str, dict[str, Any]]", older),
        )
    except (KeyError, ValueError, TypeError):
        return None


def ancestors(sources: Sequence[Source]) -> dict[str, Any]:
    """Recipe and sources of every merged file among `sources`, and of those that they were made of, newest first."""
    found: dict[str, Any] = {}
    older: dict[str, Any] = {}
    for source in sources:
        if isinstance(source.store, SafetensorsFile) and (ancestry := find(source.store.metadata)):
            found[ancestry.root] = {
                "recipe": ancestry.recipe,
                "sources": [vars(origin) for origin in ancestry.sources],
            }
            older |= ancestry.ancestors
    kept: dict[str, Any] = {}
    size = 0
    for root, entry in {**found, **older}.items():
        size += len(json.dumps(entry)) + len(root)
        if size > MAX_ANCESTORS_BYTES:
            break
        kept[root] = entry
    return kept


def metadata(
    recipe: Mapping[str, Any], plan: Plan, root: str, roots: Sequence[str], older: Mapping[str, Any]
) -> dict[str, str]:
    """The texts of a merged file's header: the same for the same recipe and models, wherever it is made."""
    first = plan.sources[0].store
    texts: dict[str, str] = {}
    if isinstance(first, SafetensorsFile):
        texts |= {key: first.metadata[key] for key in KEPT if key in first.metadata}
    sources = [
        {"name": source.name, "root": found, "table": table((source.origin or source.store).metas)}
        for source, found in zip(plan.sources, roots, strict=True)
    ]
    texts |= {
        "format": "pt",
        "merge.version": VERSION,
        "merge.recipe": _json(recipe),
        "merge.sources": _json(sources),
        "merge.root": root,
        "modelspec.merged_from": ", ".join(source.name for source in plan.sources),
    }
    if older:
        texts["merge.ancestors"] = _json(older)
    return texts


def tree(path: Path) -> list[str]:
    """The lines of a file's family tree: what it was made of and how, down to models that are no merges."""
    ancestry = Ancestry.of(path)
    lines = [f"{path.name}  {ancestry.root[:16]}  {_how(ancestry.recipe)}"]

    def below(sources: Sequence[Mapping[str, Any]], depth: int) -> None:
        for source in sources:
            known = ancestry.ancestors.get(source["root"])
            how = f"  {_how(known['recipe'])}" if known else ""
            lines.append(f"{'  ' * depth}{source['name']}  {source['root'][:16]}{how}")
            if known:
                below(known["sources"], depth + 1)

    below([vars(origin) for origin in ancestry.sources], 1)
    return lines


def _how(recipe: Mapping[str, Any]) -> str:
    """A recipe in a few words."""
    steps = [cast("dict[str, Any]", step) for step in recipe.get("steps", [])]
    words: list[str] = []
    for step in steps:
        numbers = ", ".join(f"{key}={value}" for key, value in step["method"].items() if key != "type")
        words.append(f"{step['method']['type']}({numbers})")
    return ", ".join(words) or "components"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
