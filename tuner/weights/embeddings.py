"""Files of new words: vectors under the names by which A1111, Forge, ComfyUI and diffusers look for them.

A word is a file of its own. It has one tensor `emb_params` for Stable Diffusion 1 and 2, and `clip_l`, `clip_g`, or the
one of them that there is, for others; all are `[vectors, D]`. In a LoRA's file a word's tensors stand under
`bundle_emb.WORD.`, where one tensor is called `string_to_param.*`: that name all readers of such files know.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tuner.errors import DataError
from tuner.weights.store import SafetensorsFile

BUNDLE = "bundle_emb"


def keys(architecture: str) -> dict[str, str]:
    """For each text encoder that takes words, by its component, what a word's vectors are called in a file."""
    if architecture.startswith(("stable-diffusion-v1", "stable-diffusion-v2")):
        return {"text_encoder": "emb_params"}
    both = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    alone = "text_encoder" if architecture.startswith("flux") else "text_encoder_2"
    return {alone: both[alone]} if architecture.startswith("flux") or architecture.endswith("refiner") else both


def to_tensors(word: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """A file's tensors of a word's vectors, which come by component."""
    names = keys(architecture)
    return {names[component]: vectors for component, vectors in word.items()}


def bundled(token: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A word's tensors as they are called in a LoRA's file; `token` holds no dot."""
    return {f"{BUNDLE}.{token}.{key.replace('emb_params', 'string_to_param.*')}": part for key, part in tensors.items()}


def read_embedding(file: Path, architecture: str) -> dict[str, Tensor]:
    """The vectors of the word in `file`, by component.

    Raises:
        DataError: it is not a word's file of this family.
    """
    stored = SafetensorsFile(file)
    components = {key: component for component, key in keys(architecture).items()}
    others = stored.metas.keys() - components.keys()
    if others or not stored.metas:
        found = f"holds {min(others)}" if others else "holds nothing"
        raise DataError(f"{file}: {found}, expected {' and '.join(components)}; give an embedding of this family")
    return {components[key]: stored.read(key) for key in stored.metas}
