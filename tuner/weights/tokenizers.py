"""The tokenizers of CLIP and T5, as the files that a diffusers folder has them in.

Shipped is the least that everything else follows from, compressed, in `tuner/families/configs/tokenizers`: CLIP's
48,894 merges in their order, from which the 49,408 words follow (OpenAI 2021, MIT), and T5's SentencePiece model, from
which `tokenizer.json` follows (Google 2019, Apache-2.0). The files that are made of them are the published ones.
"""

import base64
import json
import lzma
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "families" / "configs" / "tokenizers"
START, END = "<|startoftext|>", "<|endoftext|>"
T5_SPARE = 100
"""How many words `<extra_id_…>` stand behind T5's own; the last number comes first."""


@cache
def clip_files(pad: str) -> Mapping[str, bytes]:
    """A folder's files of CLIP's tokenizer, by name.

    Args:
        pad: the word that short texts are filled up with: `END`, or `!` where OpenCLIP encodes them.
    """
    words = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **words,
    }
    vocabulary = {word: number for number, word in enumerate(_clip_words())}
    return {
        "merges.txt": f"#version: 0.2\n{_unpacked('clip-merges.txt').decode()}".encode(),
        "vocab.json": json.dumps(dict(sorted(vocabulary.items())), indent=2, ensure_ascii=False).encode() + b"\n",
        "special_tokens_map.json": _json(words),
        "tokenizer_config.json": _json(config),
    }


@cache
def t5_files() -> Mapping[str, bytes]:
    """A folder's files of T5's tokenizer, by name."""
    spare = [f"<extra_id_{number}>" for number in range(T5_SPARE)]
    words = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config: dict[str, object] = {
        "add_prefix_space": True,
        "additional_special_tokens": spare,
        "clean_up_tokenization_spaces": True,
        "extra_ids": T5_SPARE,
        "legacy": True,
        "model_max_length": 512,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        **words,
    }
    return {
        "spiece.model": _unpacked("t5-spiece.model"),
        "tokenizer.json": json.dumps(_t5_pipeline(spare), ensure_ascii=False).encode(),
        "special_tokens_map.json": _json({"additional_special_tokens": spare, **words}),
        "tokenizer_config.json": _json(config),
    }


def _t5_pipeline(spare: list[str]) -> dict[str, object]:
    """T5's SentencePiece model in the words of the library tokenizers."""
    pieces: list[tuple[str, float]] = []
    normal = b""
    for field, value in _fields(_unpacked("t5-spiece.model")):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0]))
        elif field == 3:
            normal = dict(_fields(value))[2]
    vocabulary = [*pieces, *((word, 0.0) for word in reversed(spare))]
    numbers = {word: number for number, (word, _) in enumerate(vocabulary)}
    special = ["<pad>", "</s>", "<unk>", *reversed(spare)]
    around = {"lstrip": False, "rstrip": False}
    added = [
        {
            "id": numbers[word],
            "content": word,
            "single_word": False,
            **(around if word not in spare else {"lstrip": True, "rstrip": True}),
            "normalized": False,
            "special": True,
        }
        for word in special
    ]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normal).decode()},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [numbers["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": numbers["<unk>"], "vocab": vocabulary, "byte_fallback": False},
    }


def _clip_words() -> list[str]:
    """Every word of CLIP's, in the order of their numbers: bytes, bytes that end a word, merges, start and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]
    merges = [line.replace(" ", "") for line in _unpacked("clip-merges.txt").decode().splitlines()]
    return [*letters, *(f"{letter}</w>" for letter in letters), *merges, START, END]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffer in their order: numbers as little-endian bytes, everything else as it is."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = number()
        match key & 7:
            case 0:
                yield key >> 3, number().to_bytes(8, "little")
                continue
            case 1:
                length = 8
            case 5:
                length = 4
            case _:
                length = number()
        yield key >> 3, message[place : place + length]
        place += length


@cache
def _unpacked(name: str) -> bytes:
    return lzma.decompress((FOLDER / f"{name}.xz").read_bytes())


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
