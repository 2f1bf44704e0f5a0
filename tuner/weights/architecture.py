"""What a file holds, told from its tensors' names and shapes alone: the kind of network, and in whose names.

Families and their variants are told apart by their topology, not by their sizes: a small network with Stable Diffusion
1's layers is `sd1`. For a LoRA that is possible only where its modules give it away. What differs in numbers alone
cannot be told: Stable Diffusion 2 that predicts noise from that which predicts velocity, 3.5 large from its turbo.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tuner.weights.store import TensorMeta

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "ldm", "ddpm"]
Layout = Literal["ldm", "diffusers", "kohya", "peft"]
"""Whose names: the original single file's, a diffusers folder's; for a LoRA kohya's or peft's."""

TITLES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "ldm": "latent diffusion with text",
    "ddpm": "a U-Net without text",
}
VARIANT_TITLES = {
    "sd3-medium": "Stable Diffusion 3 medium",
    "sd35-medium": "Stable Diffusion 3.5 medium",
    "sd35-large": "Stable Diffusion 3.5 large",
    "flux-dev": "Flux dev",
    "flux-schnell": "Flux schnell",
}
"""Of families whose variants are different networks."""
PURPOSES = {
    **dict.fromkeys(((family, 9) for family in ("sd1", "sd2", "sdxl")), "inpainting"),
    **dict.fromkeys(((family, 8) for family in ("sd1", "sd2", "sdxl")), "editing"),
    ("sd2", 5): "depth",
    ("sd3", 33): "inpainting",
    ("flux", 384): "inpainting",
    ("flux", 128): "control",
}
"""What a network with so many input channels is for, where that is not text-to-image."""

NETWORK_PREFIXES = ("model.diffusion_model.", "unet.", "transformer.", "diffusion_model.", "")
"""Where the denoising network's names may begin; files of the network alone have none."""
COMPONENTS = (
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("first_stage_model.", "vae"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # the refiner has only that one
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5", "text_encoder_3"),
    ("depth_model.", "depth_estimator"),
    ("model_ema.", "ema"),
)
"""The components of a single file, in diffusers' words, by how their names begin."""
FOLDERS = (
    *("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"),
    *("vqvae", "bert"),
)
TRANSFORMERS = ("sd3", "flux")
"""Families whose network is a `transformer` in diffusers' words."""
STRANGERS = {
    "distilled_guidance_layer.in_proj.bias": "Chroma",
    "single_stream_modulation.lin.weight": "Flux 2",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": "Flux 2",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "clip_txt_mapper.weight": "Stable Cascade's prior",
    "down_blocks.1.0.channelwise.0.weight": "Stable Cascade's decoder",
    "encoder_hid_proj.weight": "Kolors",
    "input_blocks.1.0.time_stack.in_layers.0.weight": "Stable Video Diffusion",
    "down_blocks.0.resnets.0.spatial_res_block.norm1.weight": "Stable Video Diffusion",
    "cap_embedder.0.weight": "Lumina 2",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "HunyuanVideo",
    "head.modulation": "Wan",
    "patchify_proj.weight": "LTX-Video",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "HiDream",
    "control_model.time_embed.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "input_hint_block.0.weight": "a ControlNet",
    "controlnet_blocks.0.weight": "a ControlNet",
    "emb_params": "a textual inversion",
    "clip_l": "a textual inversion",
}
"""Files that people have beside these, by a tensor's name without what may be in front of it."""
PARTS = ("input_blocks.", "output_blocks.", "down_blocks.", "joint_blocks.", "double_blocks.", "transformer_blocks.")
"""How names begin inside of the networks that are known here."""
TOLD_A_PICTURE = ("label_emb.0.0.weight", "middle_block.0.in_layers.2.weight", "out.2.weight")
TEXT_ENCODERS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder alone",
    "text_model.embeddings.token_embedding.weight": "a CLIP text encoder alone",
}

TEXT_NAMES: dict[str, tuple[Family, ...]] = {
    "cond_stage_model.transformer.": ("sd1", "ldm"),
    "cond_stage_model.model.": ("sd2",),
    "conditioner.embedders.0.transformer.": ("sdxl",),
    "conditioner.embedders.0.model.": ("sdxl-refiner",),
    "conditioner.embedders.1.": ("sdxl",),
    "text_encoders.": ("sd3", "flux"),
}
"""How the names of text encoders begin in single files, and the families that call theirs so."""

V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
MARKS = {V_PREDICTION, ZERO_TERMINAL_SNR, "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"}
"""Tensors of no network, by which SDXL files say how they were trained."""


def component_of(name: str) -> str | None:
    """The component that the tensor `name` belongs to, as far as the beginning of its name tells; None for none.

    The denoising network of a single file is `unet` here, whatever it is, and its T5 encoder `text_encoder_3`.
    """
    found = next((component for prefix, component in COMPONENTS if name.startswith(prefix)), None)
    first = name.partition(".")[0]
    return first if found is None and first in FOLDERS else found


@dataclass(frozen=True)
class Architecture:
    """What is known of a file."""

    family: Family | None = None
    """None when it cannot be told, or there is no network in the file."""
    layout: Layout | None = None
    lora: bool = False
    """Whether it is a LoRA, or another small change to a network, rather than a network."""
    channels: int | None = None
    """Input channels of the network."""
    prefix: str = ""
    """How the network's names begin."""
    alone: Literal["unet", "vae"] | None = None
    """The component whose names have nothing in front, as in files of one component."""
    components: tuple[str, ...] = ()
    """What is in a checkpoint, in diffusers' words."""
    marks: frozenset[str] = frozenset()
    """Those of `MARKS` that are there."""
    variant: str | None = None
    """The released network of this topology, as the folders of `tuner/families/configs` are called; None where several
    are, or none."""
    stranger: str | None = None
    """What it is where it is none of these networks, or several at once."""

    @property
    def purpose(self) -> str:
        """`text-to-image`, `inpainting`, `editing`, `depth` or `control`."""
        return PURPOSES.get((self.family or "", self.channels or 0), "text-to-image")

    @property
    def prediction(self) -> Literal["v"] | None:
        """`v` where the file says so; None where it says nothing, as most do whatever they predict."""
        return "v" if self.marks & {V_PREDICTION, "edm_vpred.sigma_max"} else None

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the file says that it was trained down to no signal at all."""
        return ZERO_TERMINAL_SNR in self.marks

    def component(self, name: str) -> str | None:
        """The component that the tensor `name` belongs to, in diffusers' words; None for what belongs to none."""
        found = component_of(name)
        if found is None and self.alone is not None and name not in MARKS:
            found = self.alone
        if found == "unet" and self.family in TRANSFORMERS:
            return "transformer"
        if found == "text_encoder_3" and self.family == "flux":
            return "text_encoder_2"
        return found

    def __str__(self) -> str:
        if not self.family:
            return f"{'a LoRA for ' if self.lora else ''}{self.stranger or 'an unknown network'}"
        title = VARIANT_TITLES.get(self.variant or "", TITLES[self.family])
        purpose = "" if self.purpose == "text-to-image" else f" for {self.purpose}"
        return f"a LoRA for {title}" if self.lora else f"{title}{purpose}"

    def difference(self, other: "Architecture") -> str | None:
        """Why files of the two cannot be merged tensor by tensor; None when nothing is known against it.

        Input channels may differ: what to do about them is a merge's own decision.
        """
        if self.family != other.family or (self.family == "sd3" and self.variant != other.variant):
            return f"one is {self}, the other {other}"
        if self.layout != other.layout:
            return f"one has {self.layout} names, the other {other.layout} names"
        if self.marks != other.marks:
            one = sorted(self.marks ^ other.marks)[0]
            return (
                f"only {'the first' if one in self.marks else 'the second'} says {one!r}, so they predict differently"
            )
        return None


def identify(metas: Mapping[str, TensorMeta]) -> Architecture:
    """The architecture of the file whose tensors are `metas`; what cannot be told is None."""
    if is_lora(metas):
        return _lora(metas)
    known = Architecture(marks=frozenset(MARKS & metas.keys()))
    found = [_described(metas, prefix, *network) for prefix in NETWORK_PREFIXES for network in _networks(metas, prefix)]
    if len(found) > 1:
        return replace(known, stranger=f"a mixture of {found[0]} and {found[1]}")
    if found and (others := _text_of_others(metas, found[0])):
        return replace(known, stranger=f"a mixture of {found[0]} and {others}")
    if found:
        known = replace(found[0], marks=known.marks)
    else:
        layout, alone = _without_network(metas)
        known = replace(known, layout=layout, alone=alone, stranger=_stranger(metas))
    components = {found for name in metas if (found := known.component(name)) is not None}
    return replace(known, components=tuple(sorted(components)))


def _text_of_others(metas: Mapping[str, TensorMeta], known: Architecture) -> str | None:
    """Whose text encoders there are, where it is another family than the network's; None where all is well."""
    if known.family is None:
        return None
    for start, families in TEXT_NAMES.items():
        if known.family not in families and any(name.startswith(start) for name in metas):
            return f"text encoders of {' or '.join(TITLES[family] for family in families)}"
    return None


def _without_network(metas: Mapping[str, TensorMeta]) -> tuple[Layout | None, Literal["vae"] | None]:
    """The layout of a file without a denoising network, and whether it is an autoencoder's alone."""
    if "decoder.up.0.block.0.conv1.weight" in metas:
        return "ldm", "vae"
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in metas:
        return "diffusers", "vae"
    if any(name.startswith(prefix) for name in metas for prefix, _ in COMPONENTS):
        return "ldm", None
    return ("diffusers" if any(name.partition(".")[0] in FOLDERS for name in metas) else None), None


def _described(
    metas: Mapping[str, TensorMeta], prefix: str, family: Family, layout: Layout, first: str
) -> Architecture:
    """The network whose names begin with `prefix`; `first` is the name of its first layer's weight."""
    shape = metas[prefix + first].shape
    channels = shape[1] if len(shape) > 1 else None
    found = Architecture(family, layout, channels=channels, prefix=prefix, alone=None if prefix else "unet")
    return replace(found, variant=_variant(found, metas))


def _variant(known: Architecture, metas: Mapping[str, TensorMeta]) -> str | None:
    def has(*names: str) -> bool:
        return any(known.prefix + name in metas for name in names)

    if known.family == "sd3" and known.channels == 16:
        if has("joint_blocks.0.x_block.attn2.qkv.weight", "transformer_blocks.0.attn2.to_q.weight"):
            return "sd35-medium"
        normed = has("joint_blocks.0.x_block.attn.ln_q.weight", "transformer_blocks.0.attn.norm_q.weight")
        return "sd35-large" if normed else "sd3-medium"
    if known.family == "flux" and known.purpose == "text-to-image":
        guided = has("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
        return "flux-dev" if guided else "flux-schnell"
    variants: dict[tuple[Family | None, int | None], str] = {
        ("sd1", 4): "sd1",
        ("sd1", 9): "sd1-inpainting",
        ("sd2", 5): "sd2-depth",
        ("sd2", 9): "sd2-inpainting",
        ("sdxl", 4): "sdxl",
        ("sdxl", 9): "sdxl-inpainting",
        ("sdxl-refiner", 4): "sdxl-refiner",
    }
    return variants.get((known.family, known.channels))


def _networks(metas: Mapping[str, TensorMeta], prefix: str) -> list[tuple[Family, Layout, str]]:
    """Family, layout and the name of the first layer's weight, of the networks whose names begin with `prefix`."""

    def has(*names: str) -> bool:
        return all(prefix + name in metas for name in names)

    found: list[tuple[Family, Layout, str]] = []
    if has("input_blocks.0.0.weight", "out.2.weight"):
        attention = metas.get(f"{prefix}input_blocks.1.1.proj_in.weight")
        family = _unet(attention, has("label_emb.0.0.weight"), has("input_blocks.11.0.in_layers.2.weight"))
        if family == "sd1" and _of_bert(metas, prefix):
            family = "ldm"
        if family:
            found.append((family, "ldm", "input_blocks.0.0.weight"))
    if has("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"):
        attention = metas.get(f"{prefix}down_blocks.0.attentions.0.proj_in.weight")
        family = _unet(attention, has("add_embedding.linear_1.weight"), has("down_blocks.3.resnets.0.conv1.weight"))
        if family is None and _textless(metas, prefix):
            family = "ddpm"
        if family == "sd1" and _of_bert(metas, prefix):
            family = "ldm"
        if family and not has("encoder_hid_proj.weight"):
            found.append((family, "diffusers", "conv_in.weight"))
    if has("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"):
        found.append(("sd3", "ldm", "x_embedder.proj.weight"))
    if has("controlnet_blocks.0.weight"):
        return found
    if has("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"):
        found.append(("sd3", "diffusers", "pos_embed.proj.weight"))
    if has("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight"):
        found.append(("flux", "ldm", "img_in.weight"))
    if has(
        "single_transformer_blocks.0.attn.to_q.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "x_embedder.weight",
    ):
        found.append(("flux", "diffusers", "x_embedder.weight"))
    return found


TOLD = (".attn2.", ".add_k_proj.", ".proj_in.", "add_embedding.", ".temp_", "encoder_hid_proj.")
"""What names hold of a U-Net that is told more than a class."""
LDM_WIDTH = 1280
"""Of what the published latent diffusion model attends to, with Stable Diffusion 1's layers otherwise."""


def _textless(metas: Mapping[str, TensorMeta], prefix: str) -> bool:
    """Whether a U-Net in diffusers' names is told nothing, or a class."""
    own = [name[len(prefix) :] for name in metas if name.startswith(prefix)]
    blocks = {"down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"}
    return blocks <= set(own) and not any(told in name for name in own for told in TOLD)


def _of_bert(metas: Mapping[str, TensorMeta], prefix: str) -> bool:
    """Whether a U-Net with Stable Diffusion 1's layers is told by latent diffusion's text encoder."""
    if any(name.startswith(("text_encoder.", "cond_stage_model.")) for name in metas):
        return "cond_stage_model.transformer.token_emb.weight" in metas
    places = ("down_blocks.0.attentions.0.", "input_blocks.1.1.")
    told = [metas.get(f"{prefix}{place}transformer_blocks.0.attn2.to_k.weight") for place in places]
    wide = any(meta is not None and meta.shape[-1] == LDM_WIDTH for meta in told)
    return wide or any(name.startswith("bert.") for name in metas)


def _stranger(metas: Mapping[str, TensorMeta]) -> str | None:
    """What is in a file without any of the networks that are known here, where people are likely to have it."""
    for start, title in (*STRANGERS.items(), *TEXT_ENCODERS.items()):
        if any(prefix + start in metas for prefix in NETWORK_PREFIXES):
            return title
    if metas and all(name.startswith(tuple(TEXT_NAMES)) for name in metas):
        return "text encoders alone"
    if any(name.startswith("model_ema.") for name in metas):
        return "averages of a training (model_ema.…) without its weights"
    if any(all(prefix + name in metas for name in TOLD_A_PICTURE) for prefix in NETWORK_PREFIXES):
        return "Stable Diffusion 2 unCLIP, or another U-Net that is told a picture"
    inner = (name.removeprefix(prefix) for name in metas for prefix in NETWORK_PREFIXES)
    if any(name.startswith(PARTS) for name in inner):
        return "a part of a network, or an unknown one"
    for prefix in ("vae.", "first_stage_model.", ""):
        parts = ("decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")
        if any(prefix + part in metas for part in parts) and all(name.startswith(prefix) for name in metas):
            return "an autoencoder alone"
    return None


def _unet(attention: TensorMeta | None, label: bool, deep: bool) -> Family | None:
    """The family of a U-Net.

    Args:
        attention: the way into the attention of its first level; XL has none there.
        label: whether it is told sizes, as XL is.
        deep: whether it has four levels; XL's base has three.
    """
    if attention is None:
        return ("sdxl-refiner" if deep else "sdxl") if label else None
    if label:
        return None  # Stable Diffusion 2 unCLIP, which is told a picture, and Stable Video Diffusion
    return "sd1" if len(attention.shape) == 4 else "sd2"


KOHYA = ("lora_unet_", "lora_te", "lycoris_")
"""How names begin in kohya's and LyCORIS' files."""
_LORA = re.compile(
    r"(.*\.)?\w+_lora[12]?\.(down|up)\.weight|.*\.(lora_(down|up|mid|A|B|embedding_A|embedding_B)(\.\w+)?(\.weight)?"
    r"|lora(_linear_layer)?\.(down|up)\.weight"
    r"|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_blocks|oft_diag|dora_scale|lora_magnitude_vector(\.\w+)*"
    r"|(oft_R|boft_[Rs]|ia3_l)(\.\w+)*|diff(_b)?|[wb]_norm|set_weight|on_input)"
    r"|(diffusion_model|text_encoders)\..*\.([ab][12]|bm)\.weight"
)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA or its like, and not a network with one attached."""
    found = False
    for name in names:
        if ".base_layer." in name:
            return False
        found = found or name.startswith(KOHYA) or _LORA.fullmatch(name) is not None
    return found


CROSS_ATTENTION: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
"""Width of what the released networks attend to."""
FLUX_WIDTH = 3072


def _lora(metas: Mapping[str, TensorMeta]) -> Architecture:
    kohya = any(name.startswith(KOHYA) for name in metas)
    layout = "kohya" if kohya else "peft" if any(".lora_A." in name for name in metas) else None
    return Architecture(_lora_family(metas), layout, lora=True)


def _lora_family(metas: Mapping[str, TensorMeta]) -> Family | None:
    """By modules that one family alone has, else by the sizes of the matrices on the side of the input."""
    plain = {name.replace(".", "_"): meta for name, meta in metas.items()}
    if any("double_blocks" in name or "single_blocks" in name for name in plain):
        return "flux"
    if any("single_transformer_blocks" in name for name in plain):
        return "flux"
    if any("joint_blocks" in name for name in plain):
        return "sd3"
    if any(name.startswith(("lora_te2_", "text_encoder_2_")) for name in plain):
        return "sdxl"
    for name, meta in plain.items():
        module = name.removesuffix("_lora_down_weight").removesuffix("_lora_A_weight")
        if module == name or len(meta.shape) not in (2, 4):
            continue
        width = meta.shape[-1] if len(meta.shape) == 2 else 0
        if module.startswith("transformer_transformer_blocks") and module.endswith("to_q"):
            return "flux" if width == FLUX_WIDTH else "sd3"
        if module.endswith("attn2_to_k") and width in CROSS_ATTENTION:
            return CROSS_ATTENTION[width]
        if module.endswith("proj_in") and len(meta.shape) == 4:
            return "sd1"
    return None
