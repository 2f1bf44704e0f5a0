"""`tuner merge diff`: how two checkpoints differ, or how several that come from one base get on with each other.

tuner merge diff a.safetensors b.safetensors [plot=diff.png] [json=diff.json] [tensors=20]
tuner merge diff a.safetensors b.safetensors ... base=sd15.safetensors [plot=diff.png] [json=diff.json]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from merge import compare, interference
from merge.kinship import same_base
from merge.run import translated
from tuner.config.loader import apply_overrides, decode
from tuner.errors import ConfigError
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_store
from tuner.weights.store import TensorStore
from tuner.weights.writer import atomic_write_text


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared, and what is shown."""

    models: tuple[Path, ...]
    """Two checkpoints; with a base, two or more."""
    base: Path | None = None
    """What the models were made from; their changes to it are compared then."""
    tensors: int = 10
    """How many of the tensors that differ most are listed."""
    plot: Path | None = None
    """A PNG file to draw the blocks into."""
    json: Path | None = None
    """A file for everything that was found, tensor by tensor."""

    def __post_init__(self) -> None:
        if len(self.models) < 2 or (self.base is None and len(self.models) > 2):
            raise ValueError(f"models: expected two, or more with a base, got {len(self.models)}")
        if self.tensors < 0:
            raise ValueError(f"tensors: must be 0 or more, got {self.tensors}")


def read(words: Sequence[str]) -> Config:
    """The config that the words of a command line mean: files, and settings such as `base=a.safetensors`.

    Raises:
        ConfigError: they mean none.
    """
    files = [word for word in words if "=" not in word or Path(word).exists()]
    tree: dict[str, Any] = {"models": files}
    given = apply_overrides(tree, [word for word in words if word not in files])
    return decode(Config, tree, given)


def main(config: Config) -> None:
    """Compare, print what was found, and write what was asked for.

    Raises:
        ConfigError: a file to write is one of the models.
        DataError: a model is damaged, or they have nothing in common.
    """
    inputs = [*config.models, *([config.base] if config.base else [])]
    for key, path in (("plot", config.plot), ("json", config.json)):
        if path is not None and path.resolve() in [one.resolve() for one in inputs]:
            raise ConfigError(f"{key}: {path} is one of the models; choose another file")
    names = called(inputs)
    stores = {name: open_store(path) for name, path in zip(names, inputs, strict=True)}
    layout = identify(stores[names[0]].metas).layout
    stores = {name: translated(store, layout, path) for (name, store), path in zip(stores.items(), inputs, strict=True)}
    if config.base is None:
        found = _two(stores, names, config)
    else:
        found = _several(stores, names, config)
    if config.json is not None:
        atomic_write_text(config.json, json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def called(paths: Sequence[Path]) -> list[str]:
    """What each is called: by its file, with as many of the folders above it as tell them all apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(own[-count:]).removesuffix(".safetensors") for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index}: {path}" for index, path in enumerate(paths, start=1)]


def _two(stores: dict[str, TensorStore], names: list[str], config: Config) -> dict[str, Any]:
    a, b = names
    with _bar(stores[a]) as bar:
        found = compare.compare(stores[a], stores[b], (a, b), lambda numbers: _advance(bar, numbers))
    print(compare.describe(found, config.tensors))
    relation = same_base(stores[a], stores[b])
    print(relation)
    if config.plot is not None:
        compare.plot(found, config.plot)
    return {**found.plain(), "kinship": relation.kinship.value}


def _several(stores: dict[str, TensorStore], names: list[str], config: Config) -> dict[str, Any]:
    *models, base = names
    with _bar(stores[base]) as bar:
        found = interference.interference(
            stores[base], {model: stores[model] for model in models}, base, lambda numbers: _advance(bar, numbers)
        )
    print(interference.describe(found))
    if config.plot is not None:
        interference.plot(found, config.plot)
    return found.plain()


def _bar(store: TensorStore) -> "tqdm[Any]":
    numbers = sum(meta.bytes // meta.dtype.itemsize for meta in store.metas.values())
    return tqdm(total=numbers, unit="", unit_scale=True, desc="comparing", leave=False, disable=None)


def _advance(bar: "tqdm[Any]", numbers: int) -> None:
    bar.update(numbers)
