"""New words in the files that programs read, each read back before it counts.

A finished run's output folder holds

    embeddings/NAME-WORD.safetensors  a word of its own: A1111, Forge, ComfyUI; pipeline.load_textual_inversion(...)
    lora/NAME-bundle.safetensors      after pivotal tuning of a LoRA: kohya's file and all words in one
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.publish.provenance import Provenance
from tuner.publish.release import apart
from tuner.publish.verify import LoraError, Networks, check_words
from tuner.weights.embeddings import bundled, read_embedding, to_tensors
from tuner.weights.modelspec import hashes
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors, sync_folder, whole_folder

FOLDER = "embeddings"
Words = Mapping[str, Mapping[str, Tensor]]
"""For each new word and each text encoder, by its component, its vectors `[n, D]`."""


def file_of(name: str, token: str) -> str:
    """What the file of a word is called; programs other than diffusers call the word so, too."""
    return f"{name}-{re.sub(r'[^A-Za-z0-9_-]', '', token).strip('-')}.safetensors"


@dataclass(frozen=True)
class WordFiles:
    """Words as they were written."""

    files: tuple[Path, ...]
    vectors: int
    """How many of them, in all words, for each text encoder."""
    diffusers: bool
    """Whether a stock pipeline of the family reads words, and so has read these."""

    def __str__(self) -> str:
        readers = f"A1111, ComfyUI, Forge{', diffusers' if self.diffusers else ''}"
        return (
            f"{', '.join(map(str, self.files))} ({readers}): {len(self.files)} new word(s), {self.vectors} vector(s), "
            "read back to the bit"
        )


def write_words(
    folder: Path, words: Words, provenance: Provenance, *, networks: Networks, tokenizers: Mapping[str, Any]
) -> WordFiles:
    """Write every word into a file of its own, as `provenance.tokens` calls it.

    Each is read back, and loaded into a stock pipeline of networks like these where that can, before it counts.

    Args:
        folder: what all words' files are in; an older one is replaced.
        words: what was learned, float32.
        provenance: what the headers say.
        networks: those of a pipeline by their component; only their `config` is used.
        tokenizers: of each text encoder that learned words.

    Raises:
        DivergedError: a value is not finite.
        DataError: what was read back is not what was learned; nothing was written.
        ResourceError: the disk is full.
    """
    with whole_folder(folder) as aside:
        files = {token: aside / provenance.tokens[token] for token in words}
        for token, word in words.items():
            tensors = to_tensors(word, provenance.architecture)
            save_safetensors(files[token], tensors, provenance.spec().texts(None, tensors, "kohya"))
        try:
            for token, word in words.items():
                read = read_embedding(files[token], provenance.architecture)
                if read.keys() != word.keys() or not all(torch.equal(read[part], word[part]) for part in word):
                    raise LoraError(f"{token}: what was read is not what was written")
            in_diffusers = check_words(files, words, provenance.architecture, networks, tokenizers)
        except LoraError as error:
            raise DataError(f"{folder}: {error}; not written, please report it") from error
    count = sum(len(next(iter(word.values()))) for word in words.values())
    return WordFiles(tuple(folder / path.name for path in files.values()), count, in_diffusers)


def write_bundle(lora: Path, words: Words, provenance: Provenance) -> Path:
    """Write kohya's file `lora`, which was read back before, and all words into one file beside it.

    Raises:
        DataError: what was read back is not what was written.
        ResourceError: the disk is full.
    """
    final = lora.with_name(f"{lora.stem}-bundle.safetensors")
    file = SafetensorsFile(lora)
    tensors = {name: file.read(name) for name in file.metas}
    for token, word in words.items():
        tensors |= bundled(token, to_tensors(word, provenance.architecture))
    training = {key: text for key, text in file.metadata.items() if key.startswith("ss_")}
    digest, legacy = hashes(tensors, training)
    texts = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}
    with apart(lora.parent) as aside:
        save_safetensors(aside / final.name, tensors, {**file.metadata, **texts})
        written = SafetensorsFile(aside / final.name)
        if written.metas.keys() != tensors.keys() or not all(
            torch.equal(written.read(name), tensor) for name, tensor in tensors.items()
        ):
            raise DataError(f"{final}: what was read is not what was written; not written, please report it")
        (aside / final.name).replace(final)
        sync_folder(lora.parent)
    return final
