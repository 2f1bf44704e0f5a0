"""Captions: read from files, then made into what the text encoder is given."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.errors import DataError
from tuner.rng import Position


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What becomes of a caption each time it is shown.

    Dropout decides first; otherwise the caption is split at `separator`, the first `keep` parts stay, the rest is
    shuffled, and the prefix is put in front.
    """

    prefix: str = ""
    """Put before every caption as it stands, its blank or comma included."""
    shuffle: bool = False
    """Whether the caption's parts change their order at each showing."""
    keep: int = 0
    """How many parts stay in front when shuffling."""
    separator: str = ","
    """What stands between parts."""
    dropout: float = 0.0
    """How often a caption is left empty, so that the model can be led by classifier-free guidance (0.1 is usual)."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {self.dropout}")
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, got {self.keep}")
        if self.keep and not self.shuffle:
            raise ValueError("keep has no effect with shuffle = false; set shuffle = true")
        if not self.separator:
            raise ValueError("separator must not be empty")

    def at(self, caption: str, position: Position) -> str:
        """The final caption of one showing."""
        if float(torch.rand((), generator=position.generator("caption dropout"))) < self.dropout:
            return ""
        return self.prefix + (self._shuffled(caption, position) if self.shuffle else caption)

    def plain(self, caption: str) -> str:
        """The final caption where nothing is left to chance, as for validation."""
        return self.prefix + caption

    def variants(self, caption: str) -> list[str] | None:
        """Every final caption there can be, each once, or None where they are too many to list."""
        if self.dropout == 1:
            return [""]
        if self.shuffle:
            return None
        return list(dict.fromkeys([self.prefix + caption, *([""] if self.dropout > 0 else [])]))

    def _shuffled(self, caption: str, position: Position) -> str:
        parts = [part.strip() for part in caption.split(self.separator)]
        kept, rest = parts[: self.keep], parts[self.keep :]
        order = torch.randperm(len(rest), generator=position.generator("caption order")).tolist()
        return f"{self.separator} ".join([*kept, *(rest[i] for i in order)])


def read_caption(file: Path) -> str:
    """The caption in a text file: UTF-8 with or without BOM, its lines joined by blanks.

    Raises:
        DataError: not UTF-8, or nothing in it.
    """
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    caption = " ".join(text.split())
    if not caption or "\0" in caption:
        what = "holds a NUL byte" if "\0" in caption else "is empty"
        raise DataError(f"{file}: {what}; write the picture's caption into it, or give all one `prompt`")
    return caption
