"""A diffusers folder as one store: every component's tensors by canonical name, `unet.…`, `vae.…`, `text_encoder.…`.

A component is a folder with weights in it. Their file is `diffusion_pytorch_model` or `model`, whole or in shards, and
may exist in variants, `diffusion_pytorch_model.fp16.safetensors`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from tuner.errors import DataError, did_you_mean
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.store import Location, SafetensorsFile, ShardedFile, TensorMeta, refuse_outside, refuse_pickle

LEFT_OUT = {"safety_checker"}
"""Folders with weights that are no part of what is merged; not opened."""
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}

_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(\.(?P<one>\w+))?\.safetensors(?P<index>\.index(\.(?P<two>\w+))?\.json)?"
)
"""Variants are named before `.safetensors` by all, and for an index before `.json` by diffusers."""


Weights = SafetensorsFile | ShardedFile


@dataclass(frozen=True)
class DiffusersFolder:
    """A pipeline's folder."""

    path: Path
    variant: str | None = None
    """Which files to take, such as `fp16`; None takes those of no variant, or the only one that there is."""

    @cached_property
    def components(self) -> Mapping[str, Weights]:
        """The store of each component, by the name of its folder.

        Raises:
            DataError: no component there, or one whose weights cannot be told; the message says which.
            UnsafeError: weights that are only there as a pickle, or lie elsewhere.
        """
        names = sorted(folder.name for folder in self.path.iterdir() if folder.is_dir())
        found = {name: component(self.path / name, self.variant, self.path) for name in names if name not in LEFT_OUT}
        stores = {name: store for name, store in found.items() if store is not None}
        if not stores:
            files = sorted(path.name for path in self.path.glob("*.safetensors"))
            hint = f"give a file in it, such as {files[0]}" if files else "expected a diffusers folder, or a file"
            raise DataError(f"{self.path}: holds no component with weights, such as unet/; {hint}")
        return stores

    @cached_property
    def _places(self) -> Mapping[str, tuple[Weights, str]]:
        """By canonical name: the store that has the tensor, and what it is called in there."""
        places: dict[str, tuple[Weights, str]] = {}
        for folder, store in self.components.items():
            for own in store.metas:
                name = canonical(folder, own)
                if name in places:
                    raise DataError(f"{self.path / folder}: {own!r} and {places[name][1]!r} are one tensor; keep one")
                places[name] = (store, own)
        return places

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        return {name: store.metas[own] for name, (store, own) in self._places.items()}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's canonical name, shape and dtype."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        store, own = self._places[name]
        return store.read(own)

    def own_name(self, name: str) -> tuple[Weights, str]:
        """The component's store that has the tensor `name`, and what it is called in there."""
        return self._places[name]

    def locate(self, name: str) -> Location:
        """Where the values of `name` lie."""
        store, own = self._places[name]
        return store.locate(own)


def component(folder: Path, variant: str | None = None, root: Path | None = None) -> Weights | None:
    """The weights in the folder of one component; None when it is no component's.

    Args:
        folder: such as `…/unet`.
        variant: see `DiffusersFolder`.
        root: the model's folder, out of which no file may lead; `folder` when left out.

    Raises:
        DataError: no weights beside the `config.json`, not of that variant, or of several and none is asked for.
        UnsafeError: the weights are only there as a pickle, or lie elsewhere.
    """
    paths = sorted(folder.iterdir())
    files = {path: match for path in paths if (match := _WEIGHTS.fullmatch(path.name))}
    if not files:
        if not (folder / "config.json").exists():
            return None
        if pickles := [path for path in paths if path.suffix in PICKLES]:
            refuse_pickle(pickles[0])
        raise DataError(f"{folder}: no weights beside config.json; is the download complete?")
    variants: dict[str | None, list[Path]] = {}
    for path, match in files.items():
        variants.setdefault(match["one"] or match["two"], []).append(path)
    if variant is None and None not in variants and len(variants) == 1:
        variant = next(iter(variants))
    if variant not in variants:
        known = sorted(name for name in variants if name is not None)
        there = ", ".join([*known, *(["one without a name"] if None in variants else [])])
        wanted = f"no variant {variant!r}{did_you_mean(variant, known)}" if variant else "several variants"
        raise DataError(f"{folder}: {wanted} (there are: {there}); say which one to take")
    if len(variants[variant]) > 1:
        names = " and ".join(path.name for path in variants[variant])
        raise DataError(f"{folder}: {names} are there, and either could be meant; remove one")
    (path,) = variants[variant]
    refuse_outside(path, root or folder)
    return ShardedFile(path) if files[path]["index"] else SafetensorsFile(path)
