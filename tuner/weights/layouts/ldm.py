"""Original single files and diffusers' canonical names, both ways, for Stable Diffusion 1 and XL.

    store = Assembled(file, to_diffusers(file.metas).pieces)           # a single file by canonical names
    store = Assembled(folder, from_diffusers(folder.metas).pieces)     # a folder as a single file

| component        | how its names begin in a single file                                      |
|------------------|---------------------------------------------------------------------------|
| `unet`           | `model.diffusion_model.`                                                  |
| `vae`            | `first_stage_model.`                                                      |
| `text_encoder`   | `cond_stage_model.transformer.`; XL: `conditioner.embedders.0.transformer.` |
| `text_encoder_2` | XL: `conditioner.embedders.1.model.`; refiner: `conditioner.embedders.0.model.` |

Files of a U-Net or an autoencoder alone have nothing in front. Every name is translated, or is of a kind that the other
side has no place for (`left_out`), or is an error. Single files of Stable Diffusion 2 can be read by canonical names,
but not written: the text encoder in a diffusers folder lacks their last layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tuner.errors import DataError
from tuner.weights.architecture import MARKS, Architecture, Layout, identify
from tuner.weights.layouts import ldm_unet, ldm_vae, open_clip
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.store import TensorMeta, quote
from tuner.weights.views import Piece

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, CLIP_XL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP_2, OPEN_CLIP_XL = "cond_stage_model.model.", "conditioner.embedders.1.model."
OPEN_CLIP_REFINER = "conditioner.embedders.0.model."
LEFT_OUT = re.compile(
    r"model_ema\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|scale_factor|logvar|first_stage_model\.loss\..*"
)
"""What training leaves in single files: averages, schedules, the autoencoder's loss."""

Metas = Mapping[str, TensorMeta]
Pieces = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Translation:
    """How the tensors of the other layout are made."""

    pieces: Mapping[str, tuple[Piece, ...]]
    left_out: tuple[str, ...]
    """Tensors that the other layout has no name for."""


def to_diffusers(metas: Metas) -> Translation:
    """Canonical tensors from those of a single file.

    Raises:
        DataError: of another family, or with a name that its single files do not have.
    """
    known = _expected(metas, "ldm")
    text_2 = dict.fromkeys((OPEN_CLIP_XL, OPEN_CLIP_REFINER), "text_encoder_2")
    places = {VAE: "vae", "vae.": "vae", CLIP: "text_encoder", CLIP_XL: "text_encoder", OPEN_CLIP_2: "text_encoder"}
    places |= text_2
    if known.family:
        places[known.prefix] = "unet"
    elif known.alone:
        places[""] = "vae"
    parts, pieces, left_out = _parts(metas, places)
    for prefix, part in parts.items():
        component = places[prefix]
        if component == "unet":
            made: Pieces = _renamed(part, prefix, "unet.", ldm_unet.of_single_file(part).modules())
        elif component == "vae":
            made = _renamed(part, prefix, "vae.", ldm_vae.modules(*ldm_vae.size(part)))
            for name, (piece, *_) in made.items():
                if ldm_vae.LINEAR.fullmatch(name.removeprefix("vae.")):
                    made[name] = (replace(piece, shape=piece.shape[:2]),)
        elif prefix in (CLIP, CLIP_XL):
            made = {canonical(component, name): (Piece(prefix + name, meta.shape),) for name, meta in part.items()}
        else:
            own = open_clip.to_transformers(part, prefix)
            made = {f"{component}.{name}": (piece,) for name, piece in own.items()}
            left_out += [prefix + name for name in part if name in open_clip.LEFT_OUT]
        pieces |= made
    return Translation(pieces, tuple(left_out))


def from_diffusers(metas: Metas) -> Translation:
    """The tensors of a single file from canonical ones, or from those of a U-Net or an autoencoder alone.

    Raises:
        DataError: of another family, or with a name that diffusers does not have.
    """
    known = _expected(metas, "diffusers")
    two = any(name.startswith("text_encoder_2.") for name in metas)
    one = any(name.startswith("text_encoder.") for name in metas)
    if one and known.family == "sd2":
        raise DataError(
            "a folder's text encoder of Stable Diffusion 2 lacks a layer of its single files; use a single file"
        )
    places = {"vae.": VAE, "text_encoder.": CLIP_XL if two else CLIP}
    places["text_encoder_2."] = OPEN_CLIP_XL if one else OPEN_CLIP_REFINER
    if known.family:
        places[known.prefix] = UNET
    elif known.alone:
        places[""] = VAE
    parts, pieces, left_out = _parts(metas, places)
    for prefix, part in parts.items():
        target = places[prefix]
        if target == UNET:
            made: Pieces = _renamed(part, prefix, target, _turned(ldm_unet.of_diffusers(part).modules()))
        elif target == VAE:
            made = _renamed(part, prefix, target, _turned(ldm_vae.modules(*ldm_vae.size(part))))
            for name, (piece, *_) in made.items():
                if ldm_vae.LINEAR.fullmatch(piece.name.removeprefix(prefix)):
                    made[name] = (replace(piece, shape=(*piece.shape, 1, 1)[:4]),)
        elif target in (CLIP, CLIP_XL):
            made = {target + name: (Piece(prefix + name, meta.shape),) for name, meta in part.items()}
        else:
            made = {target + name: own for name, own in open_clip.from_transformers(part, prefix).items()}
            left_out += [prefix + name for name in part if name in open_clip.LEFT_OUT]
        pieces |= made
    return Translation(pieces, tuple(left_out))


def single_file_modules(names: Iterable[str]) -> dict[str, str]:
    """What a U-Net's modules are called in a single file, without `model.diffusion_model.`, by canonical name.

    Args:
        names: the canonical names of its tensors; those of other components are passed over.

    Raises:
        DataError: a name that diffusers does not have.
    """
    own = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    modules = _turned(ldm_unet.of_diffusers(own).modules())
    found = dict.fromkeys(name.rpartition(".")[0] for name in own)
    return {f"unet.{module}": _translated(module, modules, "unet.") for module in found}


def _expected(metas: Metas, layout: Layout) -> Architecture:
    known = identify(metas)
    if known.lora or (known.family and known.family not in FAMILIES):
        raise DataError(f"{known}: its names are not translated, only those of Stable Diffusion 1, 2 and XL")
    if known.layout is not None and known.layout != layout:
        raise DataError(f"{known}: has {known.layout} names already, expected {layout} names")
    return known


def _parts(metas: Metas, prefixes: Iterable[str]) -> tuple[dict[str, dict[str, TensorMeta]], Pieces, list[str]]:
    """The tensors under each prefix, without it; those that keep their names; those that are left out.

    Raises:
        DataError: a tensor of none of these.
    """
    parts: dict[str, dict[str, TensorMeta]] = {}
    pieces: Pieces = {}
    left_out: list[str] = []
    ordered = sorted(prefixes, key=len, reverse=True)  # an empty one last
    for name, meta in metas.items():
        prefix = next((prefix for prefix in ordered if name.startswith(prefix)), None)
        if name in MARKS:
            pieces[name] = (Piece(name, meta.shape),)
        elif LEFT_OUT.fullmatch(name):
            left_out.append(name)
        elif prefix is None:
            raise DataError(f"{quote(name)}: no name of Stable Diffusion's; leave it out")
        else:
            parts.setdefault(prefix, {})[name.removeprefix(prefix)] = meta
    return parts, pieces, left_out


def _renamed(part: Metas, prefix: str, target: str, modules: Mapping[str, str]) -> Pieces:
    return {
        target + _translated(name, modules, prefix): (Piece(prefix + name, meta.shape),) for name, meta in part.items()
    }


def _translated(name: str, modules: Mapping[str, str], prefix: str) -> str:
    """`name` with the longest beginning that is a module of `modules` in the other's words.

    Raises:
        DataError: no beginning is.
    """
    module, rest = name, ""
    while module not in modules:
        if not module:
            raise DataError(f"{quote(prefix + name)}: no layer that Stable Diffusion has")
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return modules[module] + rest


def _turned(modules: Mapping[str, str]) -> dict[str, str]:
    """From diffusers' words."""
    turned = {name: original for original, name in modules.items()}
    assert len(turned) == len(modules)
    return turned
