"""The released models' configs, from `tuner/families/configs`, so that a single file becomes a folder without the hub.

A folder there is named by the variant and laid out as a diffusers folder without weights and tokenizers. Beside them
`tensors.json.xz` lists every tensor's name and shape, by which a file is known to be whole and of the published size.
"""

import json
import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from tuner.errors import ConfigError, DataError, did_you_mean
from tuner.weights.store import TensorMeta, quote
from tuner.weights.tokenizers import END, clip_files, t5_files

FOLDER = Path(__file__).parent.parent / "families" / "configs"
OPTIONAL = (".position_ids", ".embed_tokens.weight")
"""How the names of tensors end that a folder may have or not: tables of numbers, and a second name of T5's words."""
OPEN_CLIP_WIDTHS = (1024, 1280)
"""Of the text encoders whose texts are filled up with `!`: those that OpenCLIP trained."""

Json = dict[str, Any]


def variants() -> list[str]:
    """The names of the released models whose configs are here."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def configs(variant: str) -> Mapping[str, Json]:
    """The configs of a folder, by their paths in it, such as `vae/config.json`.

    Raises:
        ConfigError: there is no such variant.
    """
    folder = FOLDER / variant
    if variant not in variants():
        hint = did_you_mean(variant, variants())
        raise ConfigError(f"config: {variant!r}: no published model{hint} (there are: {', '.join(variants())})")
    return read(folder)


def read(folder: Path) -> Mapping[str, Json]:
    """The configs in a diffusers folder, by their paths in it: the index, and each component's.

    Raises:
        DataError: no diffusers folder, or a damaged config.
    """
    paths = [folder / "model_index.json", *sorted(folder.glob("*/config.json")), *folder.glob("scheduler/*.json")]
    return {path.relative_to(folder).as_posix(): read_json(path) for path in paths}


def read_json(path: Path) -> Json:
    """The JSON object in the file.

    Raises:
        DataError: missing, or none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; give a whole diffusers folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no JSON object; download it again")
    return cast(Json, content)


def to_json(content: Json) -> bytes:
    """A config as diffusers writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def original_config(family: str) -> bytes:
    """The YAML by which user interfaces know that a single file of Stable Diffusion 1 or 2 predicts velocity."""
    return (FOLDER / f"{family}-v.yaml").read_bytes()


def tokenizers(of: Mapping[str, Json]) -> Mapping[str, bytes]:
    """The tokenizers' files that a folder with such configs has, by their paths in it."""
    found: dict[str, bytes] = {}
    for part, names in of["model_index.json"].items():
        if not part.startswith("tokenizer") or names == [None, None]:
            continue
        encoder = of.get(f"{part.replace('tokenizer', 'text_encoder')}/config.json", {})
        if names[1].startswith("T5"):
            files = t5_files()
        else:
            files = clip_files("!" if encoder.get("hidden_size") in OPEN_CLIP_WIDTHS else END)
        found |= {f"{part}/{name}": content for name, content in files.items()}
    return found


def tensors(variant: str) -> Mapping[str, tuple[int, ...]]:
    """Every tensor's shape, by its canonical name."""
    lists, used = _lists()
    return {
        f"{component}.{name}": tuple(shape)
        for component, number in used[variant].items()
        for name, shape in lists[number].items()
    }


def check(variant: str, metas: Mapping[str, TensorMeta]) -> None:
    """Refuse components that are not those of the released model.

    Args:
        variant: whose they should be.
        metas: by canonical names; components of which there is nothing are passed over.

    Raises:
        DataError: a tensor is missing, of another shape, or too many; the message names it.
    """
    components = {name.partition(".")[0] for name in metas}
    wanted = {name: shape for name, shape in tensors(variant).items() if name.partition(".")[0] in components}
    advice = f"it is no whole {variant} of the published size; name a folder whose configs fit with --config"
    for name, shape in wanted.items():
        if name in metas and metas[name].shape != shape:
            raise DataError(f"{quote(name)}: of shape {list(metas[name].shape)}, expected {list(shape)}; {advice}")
    if lost := [name for name in wanted if name not in metas]:
        raise DataError(f"{quote(lost[0])}: is missing ({len(lost)} such of {len(wanted)}); {advice}")
    if extra := [name for name in metas if name not in wanted and not name.endswith(OPTIONAL)]:
        raise DataError(f"{quote(extra[0])}: a {variant} has no such tensor ({len(extra)} such); {advice}")


def lacking(variant: str, metas: Mapping[str, TensorMeta]) -> str | None:
    """What a file lacks of the components that it has of a released model; None where it is whole, or of other sizes.

    Args:
        variant: whose they should be.
        metas: by canonical names.
    """
    components = {name.partition(".")[0] for name in metas}
    wanted = {name: shape for name, shape in tensors(variant).items() if name.partition(".")[0] in components}
    shared = [name for name in wanted if name in metas]
    lost = [name for name in wanted if name not in metas and not name.endswith(OPTIONAL)]
    if not lost or any(metas[name].shape != wanted[name] for name in shared):
        return None
    return f"{len(lost)} of {len(wanted)} tensors of {', '.join(sorted(components))}, such as {lost[0]}"


@cache
def _lists() -> tuple[list[Mapping[str, list[int]]], Mapping[str, Mapping[str, int]]]:
    """Lists of tensors, and which one each variant's components have."""
    content = json.loads(lzma.decompress((FOLDER / "tensors.json.xz").read_bytes()))
    return content["lists"], content["components"]
