import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tuner.weights import original
from tuner.weights.architecture import Architecture, identify, is_lora
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.ldm import to_diffusers
from tuner.weights.store import TensorMeta
from tuner.weights.views import Assembled

BASE = Path(__file__).parents[3] / "tuner" / "base" / "pocket"

FILES = {
    "sd1": original.sd1(),
    "sd1 inpainting": original.sd1(channels=9),
    "sd1 editing": original.sd1(channels=8),
    "sd2": original.sd2(),
    "sd2 depth": original.sd2(channels=5),
    "sdxl": original.sdxl(),
    "sdxl inpainting": original.sdxl(channels=9),
    "sdxl-refiner": original.sdxl_refiner(),
    "sd3-medium": original.sd3("sd3-medium"),
    "sd35-medium": original.sd3("sd35-medium"),
    "sd35-large": original.sd3("sd35-large"),
    "flux-dev": original.flux_dev(),
    "flux-schnell": original.flux_dev(guided=False),
}
UNETS = [name for name in FILES if not name.startswith(("sd3", "flux"))]


@pytest.mark.parametrize("name", original.DIGESTS)
def test_the_lists_that_are_tested_with_are_those_of_the_released_files(name: str) -> None:
    assert original.digest(FILES[name]) == original.DIGESTS[name]


@pytest.mark.parametrize("name", UNETS)
def test_a_single_file_is_known_by_names_and_shapes(name: str) -> None:
    family, _, purpose = name.partition(" ")
    known = identify(original.metas(FILES[name]))
    assert (known.family, known.layout, known.purpose) == (family, "ldm", purpose or "text-to-image")
    assert known.prefix == "model.diffusion_model." and not known.lora and known.prediction is None
    texts = {"sdxl": ("text_encoder", "text_encoder_2"), "sdxl-refiner": ("text_encoder_2",)}
    assert set(known.components) == {*texts.get(family, ("text_encoder",)), "unet", "vae"}
    assert known.component("model.diffusion_model.out.2.bias") == "unet"
    assert known.component("first_stage_model.quant_conv.bias") == "vae"
    assert known.component("alphas_cumprod") is None


VARIANTS = {
    "sd1": ("sd1", "Stable Diffusion 1"),
    "sd1 inpainting": ("sd1-inpainting", "Stable Diffusion 1 for inpainting"),
    "sd1 editing": (None, "Stable Diffusion 1 for editing"),
    "sd2": (None, "Stable Diffusion 2"),  # that which predicts velocity has the same tensors
    "sd2 depth": ("sd2-depth", "Stable Diffusion 2 for depth"),
    "sdxl": ("sdxl", "Stable Diffusion XL"),
    "sdxl inpainting": ("sdxl-inpainting", "Stable Diffusion XL for inpainting"),
    "sdxl-refiner": ("sdxl-refiner", "Stable Diffusion XL refiner"),
    "sd3-medium": ("sd3-medium", "Stable Diffusion 3 medium"),
    "sd35-medium": ("sd35-medium", "Stable Diffusion 3.5 medium"),
    "sd35-large": ("sd35-large", "Stable Diffusion 3.5 large"),
    "flux-dev": ("flux-dev", "Flux dev"),
    "flux-schnell": ("flux-schnell", "Flux schnell"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_released_network_is_named_in_either_layout(name: str) -> None:
    known = identify(original.metas(FILES[name]))
    assert (known.variant, str(known)) == VARIANTS[name]
    pieces = to_diffusers(original.metas(FILES[name])).pieces
    folder = identify(Assembled(Described(original.metas(FILES[name])), pieces).metas)
    assert (folder.variant, str(folder), folder.layout) == (*VARIANTS[name], "diffusers")
    assert folder.components == known.components


class Described:
    """A store of which only the descriptions are there."""

    def __init__(self, metas: Mapping[str, TensorMeta]) -> None:
        self.metas = metas

    def read(self, name: str) -> Tensor:
        raise AssertionError

    def locate(self, name: str) -> None:
        raise AssertionError


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_components_of_files_with_a_transformer_are_told(family: str) -> None:
    known = identify(original.metas(FILES[{"sd3": "sd35-large", "flux": "flux-dev"}[family]]))
    assert known.family == family
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3")[: 2 if family == "flux" else 3]
    assert known.components == tuple(sorted(("transformer", "vae", *texts)))
    assert known.component("text_encoders.t5xxl.transformer.shared.weight") == texts[-1]


WRONG = {
    "a mixture of Stable Diffusion 1 and Flux dev": original.unet() | original.flux(double=1, single=1),
    "a mixture of Stable Diffusion 1 and Stable Diffusion XL": original.unet()
    | original.unet("diffusion_model.", 320, (1, 2, 4), (0, 2, 10), 10, 2048, conv=False, sizes=2816),
    "a part of a network, or an unknown one": {
        name: shape for name, shape in original.unet().items() if ".input_blocks." in name
    },
    "a T5 text encoder alone": original.t5("", layers=1),
    "a CLIP text encoder alone": original.clip("", layers=1),
    "an autoencoder alone": original.vae(""),
    "Chroma": {"distilled_guidance_layer.in_proj.bias": (3072,), "double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "Stable Video Diffusion": original.unet(conv=False, channels=8, sizes=768)
    | {"model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": (320,)},
    "Stable Diffusion 2 unCLIP, or another U-Net that is told a picture": original.unet(
        context=1024, conv=False, sizes=2048
    ),
    "a ControlNet": {
        "controlnet_blocks.0.weight": (8, 8),
        "single_transformer_blocks.0.attn.to_q.weight": (8, 8),
        "time_text_embed.text_embedder.linear_1.weight": (8, 8),
        "x_embedder.weight": (8, 64),
    },
    "AuraFlow": {"model.diffusion_model.double_layers.0.attn.w1q.weight": (3072, 3072)},
    "a textual inversion": {"emb_params": (2, 768)},
    "an unknown network": {"something": (1,)},
}


@pytest.mark.parametrize("title", WRONG)
def test_what_is_none_of_these_is_named_where_people_have_it(title: str) -> None:
    known = identify(original.metas(WRONG[title]))
    assert (known.family, str(known)) == (None, title)


def test_numbers_of_channels_that_no_released_network_has_make_no_variant() -> None:
    for shapes in (original.unet(channels=12), original.flux(channels=384), original.mmdit(channels=33)):
        assert identify(original.metas(shapes)).variant is None
    assert str(identify(original.metas(original.flux(channels=384)))) == "Flux for inpainting"


def test_stable_diffusion_3_and_its_successors_do_not_go_together() -> None:
    one, other = (identify(original.metas(FILES[name])) for name in ("sd3-medium", "sd35-large"))
    assert one.difference(other) == "one is Stable Diffusion 3 medium, the other Stable Diffusion 3.5 large"
    one, other = (identify(original.metas(FILES[name])) for name in ("flux-dev", "flux-schnell"))
    assert one.difference(other) is None  # a merge of the two is common


def test_it_takes_milliseconds() -> None:
    metas = original.metas(FILES["sdxl"])
    start = time.process_time()
    identify(metas)
    assert time.process_time() - start < 0.1


def test_a_network_alone_is_known_without_prefix() -> None:
    for prefix in ("", "diffusion_model."):
        known = identify(original.metas(original.unet(prefix)))
        assert (known.family, known.components) == ("sd1", ("unet",))
    for prefix in ("first_stage_model.", ""):
        known = identify(original.metas(original.vae(prefix)))
        assert (known.family, known.layout, known.components) == (None, "ldm", ("vae",))


def test_the_embedded_base_is_stable_diffusion_1_in_diffusers_names() -> None:
    store = open_store(BASE)
    known = identify(store.metas)
    assert (known.family, known.layout, known.purpose) == ("sd1", "diffusers", "text-to-image")
    assert known.components == ("text_encoder", "unet", "vae")
    assert {known.component(name) for name in store.metas} == {"text_encoder", "unet", "vae"}
    alone = identify(open_store(BASE / "unet").metas)
    assert (alone.family, alone.layout, alone.components, alone.prefix) == ("sd1", "diffusers", ("unet",), "")
    alone = identify(open_store(BASE / "vae").metas)
    assert (alone.family, alone.layout, alone.components) == (None, "diffusers", ("vae",))


def metas(*names: str, **shapes: tuple[int, ...]) -> dict[str, TensorMeta]:
    """Tensors of `names`, of shape [8, 8, 1, 1] where `shapes` says nothing for the end of their name."""

    def shape(name: str) -> tuple[int, ...]:
        return next((shape for end, shape in shapes.items() if name.replace(".", "_").endswith(end)), (8, 8, 1, 1))

    return {name: TensorMeta(shape(name), torch.float16) for name in names}


DIFFUSERS_UNET = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight")
LEVEL = "down_blocks.0.attentions.0.proj_in.weight"
FEW = {
    "sd1": metas(*DIFFUSERS_UNET, LEVEL, proj_in_weight=(8, 8, 1, 1)),
    "sd2": metas(*DIFFUSERS_UNET, LEVEL, proj_in_weight=(8, 8)),
    "sdxl": metas(*DIFFUSERS_UNET, "add_embedding.linear_1.weight"),
    "sdxl-refiner": metas(
        *DIFFUSERS_UNET, "add_embedding.linear_1.weight", "down_blocks.3.resnets.0.conv1.weight"
    ),
    "sd3": metas("transformer.transformer_blocks.0.attn.add_q_proj.weight", "transformer.pos_embed.proj.weight"),
    "flux": metas(
        "transformer.single_transformer_blocks.0.attn.to_q.weight",
        "transformer.time_text_embed.text_embedder.linear_1.weight",
        "transformer.x_embedder.weight",
    ),
    "sd3 ldm": metas("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"),
    "flux ldm": metas(
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "model.diffusion_model.vector_in.in_layer.weight",
        "model.diffusion_model.img_in.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_other_networks_are_told_by_a_few_names(name: str) -> None:
    family, _, layout = name.partition(" ")
    known = identify(FEW[name])
    assert (known.family, known.layout) == (family, layout or "diffusers")
    assert known.components == ("transformer",) if family in ("sd3", "flux") else ("unet",)


def test_what_is_no_network_of_these_is_not_guessed() -> None:
    controlnet = {name: meta for name, meta in FEW["sdxl"].items() if "conv_out" not in name}
    for unknown in (controlnet, metas("a", "b.weight"), {}):
        known = identify(unknown)
        assert (known.family, known.layout, known.lora) == (None, None, False)


def test_marks_of_the_prediction_are_found() -> None:
    marked = original.metas({**FILES["sdxl"], "v_pred": (0,), "ztsnr": (0,)})
    known = identify(marked)
    assert known.prediction == "v" and known.zero_terminal_snr
    assert known.component("v_pred") is None
    plain = identify(original.metas(FILES["sdxl"]))
    assert not plain.zero_terminal_snr
    difference = plain.difference(known)
    assert difference is not None and "only the second says 'v_pred'" in difference


LORAS = {
    "sd1 kohya": {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)},
    "sd1 kohya by conv": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8, 1, 1)},
    "sd2 kohya": {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)},
    "sdxl kohya": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)},
    "sdxl peft": {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)},
    "sd3 kohya": {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 8)},
    "sd3 peft": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)},
    "flux kohya": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)},
    "flux peft": {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)},
    "None kohya": {"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3)},
    "None kohya by difference": {"lora_unet_conv_in.diff": (8, 4, 3, 3)},
    "None peft": {"unet.conv_in.lora_A.weight": (4, 4, 3, 3)},
    "None of LyCORIS": {"lycoris_conv_in.hada_w1_a": (4, 4)},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_told_from_a_checkpoint_and_its_family_where_modules_give_it_away(name: str) -> None:
    family, layout, *_ = name.split(" ")
    known = identify(original.metas(LORAS[name]))
    assert known.lora and str(known.family) == family
    assert known.layout == ("kohya" if layout == "of" else layout)


def test_a_network_with_a_lora_attached_is_no_lora() -> None:
    assert not is_lora(["unet.conv_in.base_layer.weight", "unet.conv_in.lora_A.default.weight"])
    assert not any(is_lora(shapes) for shapes in FILES.values())


def test_why_two_files_do_not_go_together_is_said() -> None:
    known = {name: identify(original.metas(shapes)) for name, shapes in FILES.items()}
    assert known["sd1"].difference(known["sd1 inpainting"]) is None
    assert known["sd1"].difference(known["sdxl"]) == "one is Stable Diffusion 1, the other Stable Diffusion XL"
    other = Architecture("sd1", "diffusers")
    assert known["sd1"].difference(other) == "one has ldm names, the other diffusers names"
    assert str(known["sd1 inpainting"]) == "Stable Diffusion 1 for inpainting"
    assert str(identify(original.metas(LORAS["sdxl peft"]))) == "a LoRA for Stable Diffusion XL"
