"""The base model's tokenizer: CLIP's scheme with a small vocabulary, one token a word of its captions.

A byte-level alphabet under it encodes any text. The merges are found by a byte-pair encoding of our own: trainers of the
`tokenizers` package break ties differently from run to run.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tuner.base.pictures import COLOURS, object_name, objects

BEGIN, END = "<|startoftext|>", "<|endoftext|>"

MAX_LENGTH = 24
"""Tokens of a prompt with begin and end; the longest caption has 11."""

PROMPT_WORDS = """
a an the of on in at with and or by for to from over under near not no two three four five
photo picture image drawing painting sketch icon emoji sticker illustration cartoon render style art pixel
background plain white coloured colored color colour
sks ohwx xyz person man woman boy girl child face head animal bird fruit vegetable food drink flower plant vehicle toy tool
instrument thing object clothes building machine monster
orange brown grey gray cyan gold silver dark light bright pale
big small large little tiny old new cute happy sad funny beautiful simple flat round square
wearing holding sitting standing eating playing flying running sleeping
beach sea water sky forest grass snow desert city street room table night day
best high low good bad worst quality blurry
""".split()
"""Words of prompts that no caption has."""


def words() -> list[str]:
    """Every word that is to be one token, sorted."""
    names = [object_name(icon) for split in objects().values() for icon in split]
    return sorted({*PROMPT_WORDS, *COLOURS, *(word for name in names for word in re.findall(r"[a-z]+|\d", name))})


def byte_alphabet() -> list[str]:
    """The character that stands for each byte: printable Latin-1 for itself, the others from U+0100 on (as in GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, first come first: the most frequent pair, in alphabetical order among equals, until none is left.

    `texts` are words of the alphabet; each ends as one token.
    """
    spellings = [(*word[:-1], word[-1] + "</w>") for word in texts]
    found: list[tuple[str, str]] = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        found.append(pair)
        spellings = [_merged(spelling, pair) for spelling in spellings]
    return found


def _merged(spelling: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in spelling:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def vocabulary(found: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merges, begin, end."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in found), BEGIN, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def write(folder: Path) -> None:
    """Write a tokenizer folder: for transformers 5 (`tokenizer.json`) and for 4 (`vocab.json`, `merges.txt`) as well."""
    from transformers import CLIPTokenizer

    found = merges(words())
    vocab = vocabulary(found)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=found, model_max_length=MAX_LENGTH)  # pyright: ignore
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    for name, content in {"vocab": vocab, "tokenizer_config": config, "special_tokens_map": special}.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocab" else 2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in found)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
