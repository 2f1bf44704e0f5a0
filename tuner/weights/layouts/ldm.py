"""Original single files and diffusers' canonical names, both ways, for every family.

    store = Assembled(file, to_diffusers(file.metas).pieces)           # a single file by canonical names
    store = Assembled(folder, from_diffusers(folder.metas).pieces)     # a folder as a single file

| component        | how its names begin in a single file                                                     |
|------------------|------------------------------------------------------------------------------------------|
| `unet`           | `model.diffusion_model.`                                                                 |
| `transformer`    | the same; a Flux transformer alone has nothing in front                                  |
| `vae`            | `first_stage_model.`; Flux: `vae.`                                                       |
| `text_encoder`   | `cond_stage_model.transformer.`; 2: `cond_stage_model.model.`;                           |
|                  | XL: `conditioner.embedders.0.transformer.`; others: `text_encoders.clip_l.transformer.`  |
| `text_encoder_2` | XL: `conditioner.embedders.1.model.`; refiner: `conditioner.embedders.0.model.`;         |
|                  | 3: `text_encoders.clip_g.transformer.`; Flux: `text_encoders.t5xxl.transformer.`         |
| `text_encoder_3` | 3: `text_encoders.t5xxl.transformer.`                                                    |
| `vqvae`, `bert`  | latent diffusion: `first_stage_model.`, `cond_stage_model.transformer.`                  |

Files of one network or an autoencoder alone have nothing in front. Every name is translated, or is of a kind that the
other side has no place for (`left_out`), or is an error.

The text encoder of Stable Diffusion 2 has 24 layers in a single file. Nothing reads the last, and diffusers' folders
have 23; a projection, which nothing reads either, is not in folders at all. A file that is made from a folder gets
stand-ins for them (`made_up`), those that sd-scripts writes: the last layer twice, ones, and one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.architecture import MARKS, TRANSFORMERS, Architecture, Layout, identify
from tuner.weights.layouts import fused, ldm_bert, ldm_unet, ldm_vae, open_clip
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.store import TensorMeta, TensorStore, quote
from tuner.weights.views import Assembled, Extended, Piece

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "ldm")
"""Those whose network is a U-Net that is told text."""
UNET, VAE, VAE_FLUX = "model.diffusion_model.", "first_stage_model.", "vae."
CLIP, CLIP_XL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP_2, OPEN_CLIP_XL = "cond_stage_model.model.", "conditioner.embedders.1.model."
OPEN_CLIP_REFINER = "conditioner.embedders.0.model."
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
TRANSFORMERS_NAMES = (CLIP, CLIP_XL, CLIP_L, CLIP_G, T5)
"""Where a single file's text encoder has the names that transformers gives it."""
LEFT_OUT = re.compile(
    r"model_ema\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|scale_factor|logvar|first_stage_model\.loss\..*"
    r"|model\.model_sampling\.\w+|text_encoders\.\w+\.logit_scale|text_encoders\..*\.spiece_model"
    r"|(depth_model|depth_estimator)\..*"
)
"""What training leaves in single files: averages, schedules, the autoencoder's loss. And the network that guesses depth
for Stable Diffusion 2, which is in both layouts, but by names of its own."""
AVERAGED = "model_ema."
SD2_LAYER, SD2_PROJECTION = 23, "text_projection"
"""What of Stable Diffusion 2's text encoder is in single files only: the layer of that number, and a tensor."""
UNREAD = re.compile(rf"(.*\.)?logit_scale|{re.escape(OPEN_CLIP_2)}{SD2_PROJECTION}")
"""What text encoders were trained with, to compare texts with pictures, and no pipeline reads: many files, and all
folders, lack it. Stable Diffusion XL's projection is read."""

WORDS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
OPEN_CLIP_G_WIDTH = 1280
LEFT_ALONE = re.compile(r"logit_scale|.*position_ids|spiece_model|scaled_fp8|vision_model\..*|visual_projection\..*")
"""What files of a text encoder alone may hold beside it."""

Metas = Mapping[str, TensorMeta]
Pieces = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Translation:
    """How the tensors of the other layout are made."""

    pieces: Mapping[str, tuple[Piece, ...]]
    left_out: tuple[str, ...]
    """Tensors that the other layout has no name for."""
    made_up: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors that the other layout has and this one lacks; nothing reads their values."""

    def of(self, store: TensorStore) -> TensorStore:
        """The tensors of `store` in the other layout."""
        made = Assembled(store, self.pieces)
        return Extended(made, self.made_up) if self.made_up else made


def to_diffusers(metas: Metas) -> Translation:
    """Canonical tensors from those of a single file.

    Raises:
        DataError: a LoRA, several networks, or a name that single files do not have.
    """
    known = _expected(metas, "ldm")
    t5 = "text_encoder_2" if known.family == "flux" or not _any(metas, CLIP_G) else "text_encoder_3"
    places = {VAE: "vae", VAE_FLUX: "vae", CLIP_G: "text_encoder_2", T5: t5}
    places |= dict.fromkeys((CLIP, CLIP_XL, CLIP_L, OPEN_CLIP_2), "text_encoder")
    places |= dict.fromkeys((OPEN_CLIP_XL, OPEN_CLIP_REFINER), "text_encoder_2")
    if known.family:
        places[known.prefix] = "transformer" if known.family in TRANSFORMERS else "unet"
        if known.family == "sd3":
            places[T5] = "text_encoder_3"
        if known.family == "ldm":
            places |= {VAE: "vqvae", CLIP: "bert"}
    elif known.alone:
        places[""] = "vae"
    parts, pieces, left_out = _parts(metas, places)
    for prefix, part in parts.items():
        component = places[prefix]
        if component == "unet":
            made: Pieces = _renamed(part, prefix, "unet.", ldm_unet.of_single_file(part).modules())
        elif component == "transformer":
            assert known.family
            own = fused.to_diffusers(known.family, part, prefix)
            made = {f"transformer.{name}": parts for name, parts in own.items()}
        elif component == "bert":
            made = _renamed(part, prefix, "bert.", ldm_bert.modules(ldm_bert.sublayers(part) // 2))
        elif component in ("vae", "vqvae"):
            made = _renamed(part, prefix, f"{component}.", ldm_vae.modules(*ldm_vae.size(part)))
            for name, (piece, *_) in made.items():
                if ldm_vae.LINEAR.fullmatch(name.removeprefix(f"{component}.")):
                    made[name] = (replace(piece, shape=piece.shape[:2]),)
        elif prefix in TRANSFORMERS_NAMES:
            made = {}
            for name, meta in part.items():
                _join(made, {canonical(component, name): (Piece(prefix + name, meta.shape),)})
        else:
            if prefix == OPEN_CLIP_2:
                gone = [name for name in part if open_clip.layer(name) == SD2_LAYER or name == SD2_PROJECTION]
                left_out += [prefix + name for name in gone]
                part = {name: meta for name, meta in part.items() if name not in gone}
            own = open_clip.to_transformers(part, prefix)
            made = {f"{component}.{name}": (piece,) for name, piece in own.items()}
            left_out += [prefix + name for name in part if name in open_clip.LEFT_OUT]
        _join(pieces, made)
    return Translation(pieces, tuple(left_out))


def from_diffusers(metas: Metas) -> Translation:
    """The tensors of a single file from canonical ones, or from those of one network or an autoencoder alone.

    Raises:
        DataError: a LoRA, several networks, or a name that diffusers does not have.
    """
    known = _expected(metas, "diffusers")
    places = _single_file_places(known, metas)
    parts, pieces, left_out = _parts(metas, places)
    made_up: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        target = places[prefix]
        network = known.family is not None and prefix == known.prefix
        if network and known.family in TRANSFORMERS:
            assert known.family
            own = fused.from_diffusers(known.family, part, prefix)
            made: Pieces = {target + name: parts for name, parts in own.items()}
        elif network:
            made = _renamed(part, prefix, target, _turned(ldm_unet.of_diffusers(part).modules()))
        elif target in (VAE, VAE_FLUX):
            made = _renamed(part, prefix, target, _turned(ldm_vae.modules(*ldm_vae.size(part))))
            for name, (piece, *_) in made.items():
                if ldm_vae.LINEAR.fullmatch(piece.name.removeprefix(prefix)):
                    made[name] = (replace(piece, shape=(*piece.shape, 1, 1)[:4]),)
        elif prefix == "bert.":
            made = _renamed(part, prefix, target, _turned(ldm_bert.modules(ldm_bert.sublayers(part))))
        elif target in TRANSFORMERS_NAMES:
            made = {target + name: (Piece(prefix + name, meta.shape),) for name, meta in part.items()}
        else:
            own = open_clip.from_transformers(part, prefix)
            if target == OPEN_CLIP_2 and max(map(open_clip.layer, own)) == SD2_LAYER - 1:
                own |= open_clip.repeated(own, SD2_LAYER - 1)
                made_up |= _sd2_stand_ins(part)
            made = {target + name: pieces for name, pieces in own.items()}
            left_out += [prefix + name for name in part if name in open_clip.LEFT_OUT]
        _join(pieces, made)
    return Translation(pieces, tuple(left_out), made_up)


def _single_file_places(known: Architecture, metas: Metas) -> dict[str, str]:
    """How a single file's names begin, by how canonical ones do."""
    two, three = _any(metas, "text_encoder_2."), _any(metas, "text_encoder_3.")
    one = _any(metas, "text_encoder.")
    if known.family == "flux" or (known.family is None and "text_encoder_2.shared.weight" in metas):
        places = {"vae.": VAE_FLUX, "text_encoder.": CLIP_L, "text_encoder_2.": T5}
    elif known.family == "sd3" or (known.family is None and three):
        places = {"vae.": VAE, "text_encoder.": CLIP_L, "text_encoder_2.": CLIP_G, "text_encoder_3.": T5}
    elif known.family == "sd2":
        places = {"vae.": VAE, "text_encoder.": OPEN_CLIP_2}
    elif known.family == "ldm":
        places = {"vqvae.": VAE, "bert.": CLIP}
    else:
        places = {"vae.": VAE, "text_encoder.": CLIP_XL if two else CLIP}
        places["text_encoder_2."] = OPEN_CLIP_XL if one else OPEN_CLIP_REFINER
    if known.family:
        bare = known.family == "flux" and known.components == ("transformer",)
        places[known.prefix] = "" if bare else UNET
    elif known.alone:
        places[""] = VAE
    return places


def _sd2_stand_ins(part: Metas) -> dict[str, Tensor]:
    """What of Stable Diffusion 2's text encoder is in single files only, but for a layer."""
    width, dtype = next((meta.shape[0], meta.dtype) for name, meta in part.items() if name.endswith("norm.weight"))
    ones = torch.ones(width, width)
    return {OPEN_CLIP_2 + SD2_PROJECTION: ones.to(dtype), f"{OPEN_CLIP_2}logit_scale": torch.ones(()).to(dtype)}


def text_encoder(metas: Metas, family: str | None) -> dict[str, str]:
    """What each tensor of a file of one text encoder is called there, by its canonical name in a model of `family`.

    Such files have transformers' names and nothing in front, as those that ComfyUI loads beside a network. Empty for
    other files. Of the projection only Stable Diffusion 3's CLIP and OpenCLIP's have a use.
    """
    if "shared.weight" in metas and "encoder.final_layer_norm.weight" in metas:
        component = "text_encoder_2" if family == "flux" else "text_encoder_3"
        return {f"{component}.{name}": name for name in metas if not LEFT_ALONE.fullmatch(name)}
    words = next((metas[name] for name in WORDS if name in metas), None)
    if words is None:
        return {}
    second = words.shape[-1] == OPEN_CLIP_G_WIDTH and family != "sd2"
    component = "text_encoder_2" if second else "text_encoder"
    projected = second or family == "sd3"
    kept = [name for name in metas if projected or name != "text_projection.weight"]
    kept = [name for name in kept if not LEFT_ALONE.fullmatch(name)]
    return {canonical(component, name): name for name in kept}


def averaged(metas: Metas) -> dict[str, str]:
    """What each tensor's average over a training is called, by its own name, and its own name for those without one.

    The averages are left out by their own names.

    Raises:
        DataError: there are none, not for all of the network, or of other shapes.
    """
    chosen = {name: name for name in metas if not name.startswith(AVERAGED)}
    network = [name for name in chosen if name.startswith(UNET)]
    found = {name: AVERAGED + name.removeprefix("model.").replace(".", "") for name in network}
    there = [name for name in network if found[name] in metas]
    if not there:
        raise DataError("holds no averages of its weights (model_ema.…); leave --ema out")
    for name in network:
        if found[name] not in metas:
            raise DataError(f"{quote(name)}: has no average, unlike others; leave --ema out")
        if metas[found[name]].shape != metas[name].shape:
            raise DataError(f"{quote(found[name])}: has another shape than {quote(name)}; leave --ema out")
    return chosen | found


def _join(pieces: Pieces, more: Pieces) -> None:
    """Put `more` to `pieces`.

    Raises:
        DataError: a tensor that is there already.
    """
    for name, own in more.items():
        if name in pieces:
            both = f"{quote(pieces[name][0].name)} and {quote(own[0].name)}"
            raise DataError(f"{both}: one tensor by two names; keep one")
        pieces[name] = own


def _any(metas: Metas, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in metas)


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
    if known.lora or (known.family is None and known.stranger and "mixture" in known.stranger):
        raise DataError(f"{known}: its names are not translated, only those of one Stable Diffusion or Flux")
    if known.family == "ddpm":
        raise DataError(f"{known}: programs have it in folders alone, with diffusers' names; leave the layout as it is")
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
