"""The base model's tokenizer: CLIP's byte-pair encoding, small; each word that it knows is one token.

Byte pairs are merged by frequency (Sennrich et al. 2016, arXiv:1508.07909), ties by spelling, so the result depends on
the words alone. Bytes are the alphabet, so any text can be said.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from tuner.base.pictures import COLOURS, object_name, objects

LENGTH = 24
"""Tokens a prompt has, start and end among them; longer ones are cut."""
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_WORDS = """
a an the of on in with and photo picture drawing painting image sketch icon style background plain colour color small
big large little cute old new happy sad toy sks ohwx xyz rare my two three orange grey gray brown dark light bright
wearing holding sitting standing next to under over left right forest beach city snow grass water night day
0 1 2 3 4 5 6 7 8 9 , . ! ? - '
"""


def words() -> list[str]:
    """Every word that is to be one token."""
    names = objects()
    told = " ".join(object_name(icon) for icon in [*names["shown"], *names["unseen"]])
    return sorted({*told.split(), *COLOURS, *PROMPT_WORDS.split()})


def byte_alphabet() -> list[str]:
    """A printable character for each byte, as GPT-2's and CLIP's tokenizers write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def merges_for(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Merges, in their order, after which each word of ASCII is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, specials last as in CLIP's."""
    merges = merges_for(words())
    bytes_ = sorted(byte_alphabet())
    tokens = [
        *bytes_,
        *(f"{byte}</w>" for byte in bytes_),
        *dict.fromkeys("".join(pair) for pair in merges),
        START,
        END,
    ]
    return {token: number for number, token in enumerate(tokens)}, merges


def tokenizer() -> CLIPTokenizer:
    """The tokenizer."""
    vocabulary, merges = build()
    make: Any = CLIPTokenizer
    return make(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )


def write(folder: Path) -> None:
    """The tokenizer in `folder`, in today's file and in the two that older programs read."""
    tokenizer().save_pretrained(folder)
    vocabulary, merges = build()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
