"""A whole fine-tuned model as a diffusers folder that every program and library version reads alike.

transformers 5 calls a text encoder's tensors by other names than transformers 4, and re-saves tokenizers as version 4
cannot read them. So the text encoder is written with the names that both know, `text_model.…`, and the tokenizer is the
base's own, file by file.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.publish.verify import listening
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.writer import atomic_write_text, save_safetensors, whole_folder

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "spiece.model", "vocab.txt"),
)
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""What the libraries call the weights in a component's folder."""
T5_TWICE = "encoder.embed_tokens.weight"
"""A name of `shared.weight` too, which files of T5 leave out."""
CLASSES = {"CLIPTokenizerFast": "CLIPTokenizer", "T5Tokenizer": "T5TokenizerFast"}
"""By which names older versions know a class, which read the files of each."""
BESIDE = ("depth_estimator", "feature_extractor")
"""Parts of a pipeline for depth that nothing learns of; they are the base's own, file by file, where it has them."""
PRIVATE = ("_name_or_path", "_commit_hash")
"""Entries of a config that hold a path of this machine."""


def write_full(folder: Path, pipeline: Any, tokenizer: Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a stock pipeline of any family as the diffusers folder `folder`, in place of an older one.

    It is read back through diffusers and every tensor compared before it appears under its name. A safety checker is
    not part of it.

    Args:
        folder: where it goes.
        pipeline: over the trained networks.
        tokenizer: the base's tokenizer folder, beside which its others are, where there are several.
        dtype: of the values in the files.

    Raises:
        DataError: a LoRA is attached, or what was read back is not what was trained; nothing was written.
        DivergedError: a value is not finite.
        ResourceError: the disk is full.
    """
    parts: dict[str, Any] = pipeline.components
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name != "safety_checker"}
    tokenizers = [name for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
    beside = _beside(pipeline, tokenizer.parent)
    states = {component: _state(component, network, dtype) for component, network in networks.items()}
    with whole_folder(folder) as aside:
        for component, state in states.items():
            (aside / component).mkdir()
            file = DIFFUSERS if _of_diffusers(networks[component]) else TRANSFORMERS
            save_safetensors(aside / component / file, state, {"format": "pt"})
            _write_json(aside / component / "config.json", _config(networks[component]))
        for name in tokenizers:
            _copy_tokenizer(tokenizer.with_name(name) if name != "tokenizer" else tokenizer, aside / name)
        (aside / "scheduler").mkdir()
        _write_json(aside / "scheduler" / "scheduler_config.json", _config(pipeline.scheduler))
        for name in beside:
            shutil.copytree(tokenizer.parent / name, aside / name)
        _write_json(aside / "model_index.json", {**_index(pipeline), **beside})
        _check(aside, folder, pipeline, states, tokenizers, dtype)
    return folder


def _of_diffusers(network: nn.Module) -> bool:
    """Whether diffusers reads and writes it; a pipeline's own text encoder is of the other library."""
    return hasattr(network, "register_to_config")


def _state(component: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is written of a network: its tensors in `dtype`, by the names that every version of the libraries knows."""
    state = network.state_dict()
    if adapted := [name for name in state if ".base_layer." in name or ".lora_" in name]:
        raise DataError(f"{component}: {adapted[0]}: a LoRA is attached; merge it into the weights, or write it alone")
    tensors = {
        name: tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in state.items()
        if not name.endswith("position_ids") and not (name == T5_TWICE and "shared.weight" in state)
    }
    return {canonical(component, name).partition(".")[2]: tensor for name, tensor in tensors.items()}


def _config(part: Any) -> dict[str, Any]:
    """A part's config as its library writes it, without paths."""
    written = part.to_json_string() if hasattr(part, "to_json_string") else part.config.to_json_string()
    table = {key: value for key, value in cast(dict[str, Any], json.loads(written)).items() if key not in PRIVATE}
    if "model_type" in table:  # transformers', which opens in the dtype that is said here, as diffusers does in float32
        table |= {"architectures": [type(part).__name__], "dtype": "float32", "torch_dtype": "float32"}
    return table


def _index(pipeline: Any) -> dict[str, Any]:
    """What says which class reads which folder."""
    from diffusers import __version__

    table: dict[str, Any] = {"_class_name": type(pipeline).__name__, "_diffusers_version": __version__}
    for name, part in pipeline.components.items():
        library, *place = type(part).__module__.split(".")
        library, kind = place[1] if place[:1] == ["pipelines"] else library, type(part).__name__
        absent = part is None or name in ("feature_extractor", "image_encoder", "safety_checker")
        table[name] = [None, None] if absent else [library, CLASSES.get(kind, kind)]
    settings = {key: value for key, value in pipeline.config.items() if isinstance(value, bool | int | float)}
    return {**table, **settings, **({"requires_safety_checker": False} if "safety_checker" in table else {})}


def _beside(pipeline: Any, base: Path) -> dict[str, Any]:
    """The parts that are copied from the base's folder, as its index has them."""
    if "depth_estimator" not in pipeline.components or not all((base / name).is_dir() for name in BESIDE):
        return {}
    index: dict[str, Any] = json.loads((base / "model_index.json").read_text("utf-8"))
    return {name: index[name] for name in BESIDE}


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The base's tokenizer, and beside it the two files that readers before transformers 5 look for."""
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    whole = target / "tokenizer.json"
    if not any((target / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")):
        raise DataError(f"{source}: no tokenizer.json and no vocab.json; give the base model's tokenizer folder")
    if whole.is_file() and not ((target / "vocab.json").is_file() and (target / "merges.txt").is_file()):
        model: dict[str, Any] = json.loads(whole.read_text("utf-8"))["model"]
        if "merges" in model:  # T5's has none
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            atomic_write_text(target / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
            atomic_write_text(target / "merges.txt", "\n".join(["#version: 0.2", *pairs]) + "\n")
        if model["type"] == "WordPiece" and not (target / "vocab.txt").is_file():
            words: dict[str, int] = model["vocab"]
            atomic_write_text(target / "vocab.txt", "\n".join(sorted(words, key=lambda word: words[word])) + "\n")


def _check(
    aside: Path,
    folder: Path,
    pipeline: Any,
    states: Mapping[str, Mapping[str, Tensor]],
    tokenizers: Sequence[str],
    dtype: torch.dtype,
) -> None:
    """Open the folder as its users will, and compare every tensor, and the tokens of a text."""
    optional = (*BESIDE, *(name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))))
    absent = {name: None for name in optional if name in pipeline.components and not (aside / name).is_dir()}
    with listening() as heard:
        try:
            stock: Any = type(pipeline).from_pretrained(aside, torch_dtype=dtype, local_files_only=True, **absent)
        except Exception as error:
            raise DataError(f"{folder}: diffusers cannot read it: {error}; not written, please report it") from error
    for component, state in states.items():
        got = _state(component, getattr(stock, component), dtype)
        wrong = [name for name in {**state, **got} if not _same(got.get(name), state.get(name))]
        if wrong:
            said = "".join(f"; it said: {text[:300]}" for text in heard[:3])
            raise DataError(
                f"{folder}: {component}: {sorted(wrong)[0]} ({len(wrong)} such): diffusers reads another value than "
                f"was trained{said}; not written, please report it"
            )
    text = "A photo of the 2 Red cats, on a (blue) background!"
    for name in tokenizers:
        if getattr(stock, name)(text).input_ids != getattr(pipeline, name)(text).input_ids:
            raise DataError(f"{folder}: {name}: reads another than was trained with; give the base's own")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
