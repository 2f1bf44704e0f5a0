"""LoRA files opened to be worked on and written again, as the recipes do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from merge.lora.network import Network
from merge.lora.ranks.base import RankRule, Ranks
from merge.lora.ranks.fixed import Fixed
from merge.lora.save import Saved, save
from tuner.errors import ConfigError
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.header import Header
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.peft_config import adapters_file
from tuner.weights.architecture import identify
from tuner.weights.layouts.modules import Dialect
from tuner.weights.store import SafetensorsFile

FileDtype = Literal["keep", "float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Workshop:
    """A few LoRAs, and the network that they are for where that is known."""

    paths: tuple[Path, ...]
    loras: tuple[Adapters, ...]
    network: Network | None = None

    @staticmethod
    def open(paths: Sequence[Path], base: Path | None = None, alpha: float | None = None) -> "Workshop":
        """Read the LoRAs at `paths`.

        Args:
            paths: files, or folders of peft's.
            base: a checkpoint of the network that they are for, without which names stay as the files spell them.
            alpha: for files of peft's without their config.

        Raises:
            DataError: a file is damaged, or not for the network of `base`.
        """
        network = Network.open(base) if base is not None else None
        modules = network.modules if network is not None else None
        paths = [path.expanduser() for path in paths]
        return Workshop(tuple(paths), tuple(read_adapters(path, modules, alpha) for path in paths), network)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Of the network's tensors; None when it is not known."""
        return self.network.shapes if self.network is not None else None

    @property
    def family(self) -> str | None:
        """The network's; told from the files where it is not given."""
        if self.network is not None:
            return self.network.family
        families = {identify(SafetensorsFile(adapters_file(path)).metas).family for path in self.paths}
        return families.pop() if len(families) == 1 else None

    def save(
        self, output: Path, adapters: Adapters, dialect: Dialect | None = None, dtype: FileDtype = "keep"
    ) -> Saved:
        """Write what was made of the LoRAs, and read it back.

        Raises:
            ConfigError: `output` is one of the inputs.
            DataError: the dialect has no word for something.
        """
        refuse_inputs(output, self.paths)
        header = Header(
            name=output.stem,
            family=self.family,
            dialect=dialect or self.loras[0].dialect,
            made_of=[path.stem for path in self.paths],
            sources=[lora.metadata for lora in self.loras],
        )
        return save(
            output,
            adapters,
            dialect or self.loras[0].dialect,
            self.network.modules if self.network is not None else None,
            None if dtype == "keep" else getattr(torch, dtype),
            lambda tensors: header.texts(adapters.changes.values(), tensors),
        )


def rule_of(ranks: Ranks) -> RankRule:
    """The rule that a config means.

    Raises:
        ConfigError: a number that is no rank.
    """
    if not isinstance(ranks, int):
        return ranks
    if ranks < 1:
        raise ConfigError(f"rank: {ranks}: at least 1")
    return Fixed(rank=ranks)


def dtype_of(adapters: Adapters, dtype: FileDtype) -> torch.dtype:
    """The dtype that a file will have; for `keep`, the widest that the LoRA has, float32 where that is not known."""
    if dtype != "keep":
        return getattr(torch, dtype)
    own = [change.product.left.dtype for change in adapters.changes.values() if isinstance(change, LowRank)]
    return max(own, key=lambda one: one.itemsize) if own else torch.float32


def refuse_inputs(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read.

    Raises:
        ConfigError: `output` is one of the inputs, or a folder, or is in none.
    """
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"output: {output}: its folder does not exist; make it first")
    if output.is_dir():
        raise ConfigError(f"output: {output}: a folder, expected the name of a file to write")
    for path in (adapters_file(path.expanduser()) for path in inputs):
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"output: {output} is also an input; choose another name")
