"""A checkpoint as what LoRAs are about: its tensors by canonical names, and the spellings of its modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DataError
from tuner.weights.architecture import TRANSFORMERS, identify
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.ldm import to_diffusers
from tuner.weights.layouts.modules import Modules
from tuner.weights.store import TensorStore
from tuner.weights.views import Assembled, Piece


@dataclass(frozen=True)
class Network:
    """A checkpoint in a folder, in a single file, or of a denoising network alone."""

    store: TensorStore
    """By canonical names."""
    modules: Modules
    family: str | None
    """Such as `sd1`; None when it cannot be told."""
    pieces: Mapping[str, tuple[Piece, ...]] | None
    """Where each tensor lies among the checkpoint's own; None where those have canonical names."""

    @staticmethod
    def open(path: Path) -> "Network":
        """The checkpoint at `path`.

        Raises:
            DataError: it is damaged, or no checkpoint.
        """
        store = open_store(path)
        if identify(store.metas).lora:
            raise DataError(f"{path}: a LoRA, expected a checkpoint")
        try:
            return Network.of(store)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @staticmethod
    def of(store: TensorStore) -> "Network":
        """The checkpoint whose tensors are in `store`."""
        known = identify(store.metas)
        pieces: Mapping[str, tuple[Piece, ...]] | None = None
        if known.layout == "ldm":
            pieces = to_diffusers(store.metas).pieces
        elif known.layout == "diffusers" and known.family and known.prefix == "":
            component = "transformer." if known.family in TRANSFORMERS else "unet."
            pieces = {component + name: (Piece(name, meta.shape),) for name, meta in store.metas.items()}
        if pieces is not None:
            store = Assembled(store, pieces)
        return Network(store, Modules.of_network(store.metas), known.family, pieces)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: meta.shape for name, meta in self.store.metas.items()}
