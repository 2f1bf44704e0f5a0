"""Captions: read from files, then made into what the text encoder is given."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, Literal

import torch

from tuner.errors import DataError
from tuner.rng import Position

LISTED = 64
"""A caption of at most so many final forms has them all listed, so that they can be encoded beforehand."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What becomes of a caption each time it is shown.

    Dropout decides first. Otherwise a line is chosen, then one of each wildcard's words; the caption is split at
    `separator`, the first `keep` parts stay, of the rest some are left out and the others shuffled; and trigger, prefix
    and suffix are put around it.
    """

    prefix: str = ""
    """Put before every caption as it stands, its blank or comma included."""
    suffix: str = ""
    """Put behind every caption as it stands."""
    trigger: str = ""
    """The words that are to call what is learned; put in front of captions that do not hold them, as a part."""
    lines: Literal["join", "choose"] = "join"
    """What several lines in a caption file are: one caption, or alternatives of which each showing takes one."""
    wildcards: bool = False
    """Whether `{a|b}` in a caption stands for one of its alternatives, drawn at each showing; they can be nested."""
    shuffle: bool = False
    """Whether the caption's parts change their order at each showing."""
    keep: int = 0
    """How many parts stay in front, whatever becomes of the others."""
    separator: str = ","
    """What stands between parts."""
    part_dropout: float = 0.0
    """How often each part behind the first `keep` is left out."""
    dropout: float = 0.0
    """How often a caption is left empty, so that the model can be led by classifier-free guidance (0.1 is usual)."""

    def __post_init__(self) -> None:
        for name in ("dropout", "part_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, got {self.keep}")
        if self.keep and not self.shuffle and not self.part_dropout:
            raise ValueError("keep has no effect with shuffle = false; set shuffle = true, or part_dropout")
        if not self.separator:
            raise ValueError("separator must not be empty")

    def at(self, caption: str, position: Position) -> str:
        """The final caption of one showing.

        Raises:
            DataError: its wildcards are not closed.
        """
        if float(torch.rand((), generator=position.generator("caption dropout"))) < self.dropout:
            return ""
        lines = self._lines(caption)
        if len(lines) > 1:
            lines = [lines[int(torch.randint(len(lines), (), generator=position.generator("caption line")))]]
        text = lines[0]
        if self.wildcards:
            rng = position.generator("caption wildcards")
            text = _drawn(_parsed(text), lambda count: int(torch.randint(count, (), generator=rng)))
        return self._whole(self._arranged(text, position) if self.shuffle or self.part_dropout else text)

    def plain(self, caption: str) -> str:
        """The final caption where nothing is left to chance, as for validation: first line, first alternatives.

        Raises:
            DataError: wildcards that are not closed, in any of its lines.
        """
        lines = self._lines(caption)
        texts = [_drawn(_parsed(line), lambda count: 0) for line in lines] if self.wildcards else lines
        return self._whole(texts[0])

    def variants(self, caption: str) -> list[str] | None:
        """Every final caption there can be, each once, or None where they are too many to list (`LISTED`).

        Raises:
            DataError: wildcards that are not closed, in any of its lines.
        """
        if self.dropout == 1:
            return [""]
        found: dict[str, None] = {}
        lines = self._lines(caption)
        for texts in [_expanded(_parsed(line)) for line in lines] if self.wildcards else [[line] for line in lines]:
            if texts is None:
                return None
            for text in texts:
                arranged = self._arrangements(text)
                if arranged is None:
                    return None
                found |= dict.fromkeys(self._whole(form) for form in arranged)
                if len(found) > LISTED:
                    return None
        return list(dict.fromkeys([*found, *([""] if self.dropout > 0 else [])]))

    def _lines(self, caption: str) -> list[str]:
        lines = caption.splitlines() or [""]
        return lines if self.lines == "choose" else [" ".join(lines)]

    def _split(self, text: str) -> tuple[list[str], list[str]]:
        parts = [part for part in (each.strip() for each in text.split(self.separator)) if part]
        return parts[: self.keep], parts[self.keep :]

    def _arranged(self, text: str, position: Position) -> str:
        kept, rest = self._split(text)
        if self.part_dropout:
            stays = torch.rand(len(rest), generator=position.generator("caption parts")) >= self.part_dropout
            rest = [part for part, stay in zip(rest, stays.tolist(), strict=True) if stay]
        if self.shuffle:
            order = torch.randperm(len(rest), generator=position.generator("caption order")).tolist()
            rest = [rest[i] for i in order]
        return f"{self.separator} ".join([*kept, *rest])

    def _arrangements(self, text: str) -> list[str] | None:
        if not (self.shuffle or self.part_dropout):
            return [text]
        kept, rest = self._split(text)
        if len(rest) > 6:  # 2 to the 7th is more than are listed, and so is 7!
            return None
        fewest = {0.0: len(rest), 1.0: 0}.get(self.part_dropout, 0)
        most = 0 if self.part_dropout == 1 else len(rest)
        found: dict[str, None] = {}
        for count in range(fewest, most + 1):
            for chosen in permutations(rest, count) if self.shuffle else combinations(rest, count):
                found[f"{self.separator} ".join([*kept, *chosen])] = None
                if len(found) > LISTED:
                    return None
        return list(found)

    def _whole(self, text: str) -> str:
        if self.trigger and not says(text, self.trigger):
            text = f"{self.trigger}{self.separator} {text}" if text else self.trigger
        return self.prefix + text + self.suffix


def says(text: str, words: str) -> bool:
    """Whether a text holds some words, in whatever case: `sks` is in `a SKS dog` and not in `two masks`.

    Scripts without cases, such as Japanese, do not part words, or write particles onto them: `猫` is in `白い猫です`.
    """
    text, words = text.casefold(), words.casefold()
    places = (match.start() for match in re.finditer(f"(?={re.escape(words)})", text))
    return any(
        not (
            _in_one_word(text[max(0, at - 1) : at] + words[0]) or _in_one_word(words[-1] + text[at + len(words) :][:1])
        )
        for at in places
    )


def _in_one_word(letters: str) -> bool:
    """Whether two letters that stand side by side are of one word."""
    return len(letters) == 2 and all(x.isdecimal() or x == "_" or x.upper() != x.lower() for x in letters)


Piece = str | list[list[Any]]
"""Text, or the alternatives of a wildcard, each a list of pieces."""


def _parsed(text: str) -> list[Piece]:
    """The pieces of a caption with wildcards.

    Raises:
        DataError: a bracket has no other.
    """
    stack: list[list[list[Piece]]] = [[[]]]
    for token in re.split(r"([{}|])", text):
        if token == "{":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "}" and len(stack) > 1:
            choice = stack.pop()
            stack[-1][-1].append(choice)
        elif token == "}":
            raise DataError(f"caption {text!r}: a '}}' closes nothing; remove it, or set captions.wildcards = false")
        elif token:
            stack[-1][-1].append(token)
    if len(stack) > 1:
        raise DataError(f"caption {text!r}: a '{{' is not closed; close it, or set captions.wildcards = false")
    return stack[0][0]


def _drawn(pieces: Sequence[Piece], draw: Callable[[int], int]) -> str:
    return "".join(piece if isinstance(piece, str) else _drawn(piece[draw(len(piece))], draw) for piece in pieces)


def _expanded(pieces: Sequence[Piece]) -> list[str] | None:
    """Every text that can be drawn, or None where they are too many to list."""
    texts = [""]
    for piece in pieces:
        if isinstance(piece, str):
            ends = [piece]
        else:
            each = [_expanded(alternative) for alternative in piece]
            ends = [end for alternative in each for end in alternative or ()]
            if None in each:
                return None
        if len(texts) * len(ends) > LISTED:
            return None
        texts = [text + end for text in texts for end in ends]
    return texts


def read_caption(file: Path) -> str:
    """The caption in a text file: UTF-8 with or without BOM; lines that hold something, each with single blanks.

    Raises:
        DataError: no file, not UTF-8, or nothing in it.
    """
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise DataError(f"{file}: is no file; remove it, and write the picture's caption into a file of its name")
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    caption = tidied(text)
    if not caption:
        what = "holds a NUL byte" if "\0" in text else "is empty"
        raise DataError(f"{file}: {what}; write the picture's caption into it, or give all one `prompt`")
    return caption


def tidied(text: str) -> str:
    """Lines that hold something, each with single blanks; nothing where a NUL or half a character is no text."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        return ""
    return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)
