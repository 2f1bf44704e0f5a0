"""Where a merged file comes from, in its own header: the recipe, what it was made of, and what that was made of.

| key               | text                                                                                     |
|-------------------|------------------------------------------------------------------------------------------|
| `merge.recipe`    | JSON: steps, numbers and settings; models by the names that the recipe gives them        |
| `merge.sources`   | JSON, for each model: name, content hash of what was used, hash of its names and shapes; |
|                   | of a merged one also `made`, its `merge.root`; where it has several files, that of one   |
| `merge.root`      | the content hash of this file's tensors                                                  |
| `merge.ancestors` | JSON: recipe and sources of every merged file among the sources, by its content hash     |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge.content import table
from merge.methods.base import Space
from merge.plan import Plan
from merge.recipe import Source
from tuner.errors import DataError
from tuner.weights.architecture import Architecture, identify
from tuner.weights.facts import PREDICTION, Facts
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import SafetensorsFile, ShardedFile

VERSION = "1"
MAX_ANCESTORS_BYTES = 500_000
"""Older generations are left out beyond this."""
GENERATIONS = 100
"""A family tree is told no further than this."""
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
    made: str | None = None
    """Of a merged model: its own content hash, or that of one of its files, as the header says."""


@dataclass(frozen=True)
class Generation:
    """How a merged file was made."""

    recipe: Mapping[str, Any]
    sources: tuple[Origin, ...]
    how: str
    """The recipe in a few words."""

    @staticmethod
    def of(recipe: Any, sources: Any) -> "Generation":
        """From what a header's JSON holds, whoever wrote it.

        Raises:
            KeyError, TypeError, AttributeError: it is something else.
        """
        origins = tuple(
            Origin(
                str(each["name"]), str(each["root"]), str(each["table"]), str(each["made"]) if "made" in each else None
            )
            for each in sources
        )
        return Generation(recipe, origins, _how(recipe))


@dataclass(frozen=True)
class Ancestry:
    """What a merged file says of itself."""

    made: Generation
    root: str
    ancestors: Mapping[str, Generation]
    """How merged files among its sources, and among theirs, were made, by content hash."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What was done."""
        return self.made.recipe

    @property
    def sources(self) -> tuple[Origin, ...]:
        """The models that it was made of."""
        return self.made.sources

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
        older = json.loads(metadata.get("merge.ancestors", "{}"))
        return Ancestry(
            Generation.of(json.loads(metadata["merge.recipe"]), json.loads(metadata["merge.sources"])),
            metadata["merge.root"],
            {root: Generation.of(entry["recipe"], entry["sources"]) for root, entry in older.items()},
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def ancestors(sources: Sequence[Source]) -> dict[str, Any]:
    """Recipe and sources of every merged file among `sources`, and of those that they were made of, newest first."""
    found: dict[str, Generation] = {}
    older: dict[str, Generation] = {}
    for source in sources:
        if ancestry := find(_header(source)):
            found[ancestry.root] = ancestry.made
            older |= ancestry.ancestors
    kept: dict[str, Any] = {}
    size = 0
    for root, made in {**found, **older}.items():
        origins = [{key: value for key, value in vars(origin).items() if value} for origin in made.sources]
        entry = {"recipe": made.recipe, "sources": origins}
        size += len(json.dumps(entry)) + len(root)
        if size > MAX_ANCESTORS_BYTES:
            break
        kept[root] = entry
    return kept


def _header(source: Source) -> Mapping[str, str]:
    """The texts in the header of a source's file, of several that of one."""
    store = source.origin or source.store
    if isinstance(store, SafetensorsFile):
        return store.metadata
    place = next((place for name in store.metas if (place := store.locate(name))), None)
    return {} if place is None else SafetensorsFile(place.path).metadata


def metadata(
    recipe: Mapping[str, Any], plan: Plan, root: str, roots: Sequence[str], older: Mapping[str, Any]
) -> dict[str, str]:
    """The texts of a merged file's header: the same for the same recipe and models, wherever it is made."""
    first = _header(plan.sources[0])
    texts = {key: first[key] for key in KEPT if key in first}
    if _velocity(plan) is not None:
        texts.setdefault(PREDICTION, "v")
    sources: list[dict[str, str]] = []
    for source, found in zip(plan.sources, roots, strict=True):
        sources.append({"name": source.name, "root": found, "table": table((source.origin or source.store).metas)})
        if ancestry := find(_header(source)):
            sources[-1]["made"] = ancestry.root
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


def facts_of(plan: Plan) -> Facts:
    """What is known of the one file that a plan makes beside its weights."""
    return replace(_said(plan) or Facts(Architecture()), known=identify(plan.metas))


def _velocity(plan: Plan) -> Facts | None:
    """What is known of the result where it predicts velocity and its weights do not say so."""
    facts = _said(plan)
    return facts if facts is not None and facts.needs_yaml else None


def _said(plan: Plan) -> Facts | None:
    """What is known of the first source that says what it predicts."""
    for source in plan.sources:
        match source.origin or source.store:
            case (SafetensorsFile(path) | DiffusersFolder(path) | ShardedFile(path)) as store if (
                source.space is Space.WEIGHT
            ):
                facts = Facts.of(path, store, source.store)
                if facts.prediction is not None:
                    return facts
            case _:
                pass
    return None


@dataclass(frozen=True)
class Ancestor:
    """A model in the family tree of a merged one."""

    name: str
    root: str
    """Its content hash; of a model that is no merge, that of what was read of it."""
    how: str | None
    """How it was made; None of a model that is no merge, or of which nothing is known."""
    sources: tuple["Ancestor", ...] = ()
    """What it was made of; of a model that is there several times this is said at the first."""


def tree(ancestry: Ancestry, name: str) -> Ancestor:
    """The family tree of a merged file, which is called `name`, down to models that are no merges."""
    told = {ancestry.root}

    def grown(origins: Sequence[Origin], generation: int) -> tuple[Ancestor, ...]:
        found: list[Ancestor] = []
        for origin in origins:
            root = origin.made or origin.root
            made = ancestry.ancestors.get(root)
            older: tuple[Ancestor, ...] = ()
            if made is not None and root not in told and generation < GENERATIONS:
                told.add(root)
                older = grown(made.sources, generation + 1)
            found.append(Ancestor(origin.name, root, made.how if made is not None else None, older))
        return tuple(found)

    return Ancestor(name, ancestry.root, ancestry.made.how, grown(ancestry.sources, 1))


def lines(ancestor: Ancestor, depth: int = 0) -> list[str]:
    """A family tree as text, each generation further in than what was made of it."""
    how = "" if ancestor.how is None else f"  {ancestor.how}"
    found = [f"{'  ' * depth}{ancestor.name}  {ancestor.root[:16]}{how}"]
    return found + [line for source in ancestor.sources for line in lines(source, depth + 1)]


def _how(recipe: Mapping[str, Any]) -> str:
    """A recipe in a few words."""
    words: list[str] = []
    for step in recipe.get("steps", []):
        numbers = ", ".join(f"{key}={value}" for key, value in step["method"].items() if key != "type")
        words.append(f"{step['method']['type']}({numbers})")
    return ", ".join(words) or "components"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
