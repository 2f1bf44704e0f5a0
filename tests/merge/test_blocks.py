"""Blocks and components by name, in both layouts."""

from itertools import product
from pathlib import Path

import pytest

import tuner.base
from merge.blocks import Blocks
from tests.tuner.weights import original
from tests.tuner.weights.test_architecture import Described
from tuner.weights.layouts.ldm import to_diffusers
from tuner.weights.store import SafetensorsFile
from tuner.weights.views import Assembled

IN = [f"IN{number:02}" for number in range(12)]
OUT = [f"OUT{number:02}" for number in range(12)]
SD1_LABELS = ("BASE", *IN, "M00", *OUT, "VAE")
SDXL_LABELS = ("BASE", *IN[:9], "M00", *OUT[:9], "VAE")


def single_file(blocks: int) -> list[str]:
    """A UNet's names in a single file, one tensor of each block."""
    sides = [f"{side}_blocks.{number}.0.weight" for side in ("input", "output") for number in range(blocks)]
    inner = [*sides, "middle_block.1.norm.bias", "time_embed.0.weight", "out.2.bias"]
    return [f"model.diffusion_model.{name}" for name in inner]


def diffusers(levels: int, layers: int = 2) -> list[str]:
    """A UNet's names in diffusers' layout: every layer and every sampler."""
    inner = ["conv_in.weight", "time_embedding.linear_1.weight", "conv_norm_out.weight", "conv_out.bias"]
    inner += ["mid_block.resnets.1.conv1.weight", "mid_block.attentions.0.norm.weight"]
    for level in range(levels):
        inner += [f"down_blocks.{level}.resnets.{layer}.conv1.weight" for layer in range(layers)]
        inner += [f"up_blocks.{level}.resnets.{layer}.conv1.weight" for layer in range(layers + 1)]
        if level < levels - 1:
            inner += [f"down_blocks.{level}.downsamplers.0.conv.weight", f"up_blocks.{level}.upsamplers.0.conv.weight"]
    return [f"unet.{name}" for name in inner]


SD1 = {"single file": single_file(12), "diffusers": diffusers(4)}
SDXL = {"single file": single_file(9), "diffusers": diffusers(3)}


@pytest.mark.parametrize("layout", SD1)
def test_stable_diffusion_1_has_12_blocks_on_each_side_and_xl_has_9(layout):
    assert Blocks.of(SD1[layout]).names == SD1_LABELS
    assert Blocks.of(SDXL[layout]).names == SDXL_LABELS


@pytest.mark.parametrize(("names", "labels"), [(SD1, SD1_LABELS), (SDXL, SDXL_LABELS)], ids=["SD 1", "SDXL"])
def test_every_block_of_the_unet_has_a_tensor_in_both_layouts_and_no_tensor_another_block(names, labels):
    for layout in names.values():
        blocks = Blocks.of(layout)
        assert {blocks.block(name) for name in layout} == set(labels) - {"BASE", "VAE"}


# The numbers of these blocks are those that diffusers' own conversion of a single file gives them.
SAME = {
    "input_blocks.0.0": ("conv_in", "IN00"),
    "time_embed.2": ("time_embedding.linear_2", "IN00"),
    "label_emb.0.0": ("add_embedding.linear_1", "IN00"),
    "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1", "IN01"),
    "input_blocks.2.1.norm": ("down_blocks.0.attentions.1.norm", "IN02"),
    "input_blocks.3.0.op": ("down_blocks.0.downsamplers.0.conv", "IN03"),
    "input_blocks.4.1.proj_in": ("down_blocks.1.attentions.0.proj_in", "IN04"),
    "input_blocks.8.0.emb_layers.1": ("down_blocks.2.resnets.1.time_emb_proj", "IN08"),
    "middle_block.1.norm": ("mid_block.attentions.0.norm", "M00"),
    "output_blocks.0.0.in_layers.2": ("up_blocks.0.resnets.0.conv1", "OUT00"),
    "output_blocks.2.1.conv": ("up_blocks.0.upsamplers.0.conv", "OUT02"),
    "output_blocks.5.2.conv": ("up_blocks.1.upsamplers.0.conv", "OUT05"),
    "output_blocks.7.1.norm": ("up_blocks.2.attentions.1.norm", "OUT07"),
}


@pytest.mark.parametrize(("names", "last"), [(SD1, "OUT11"), (SDXL, "OUT08")], ids=["SD 1", "SDXL"])
def test_a_tensor_is_in_the_same_block_by_its_name_in_either_layout(names, last):
    single, folder = Blocks.of(names["single file"]), Blocks.of(names["diffusers"])
    for ldm, (own, label) in (SAME | {"out.0": ("conv_norm_out", last), "out.2": ("conv_out", last)}).items():
        assert single.block(f"model.diffusion_model.{ldm}.weight") == label, ldm
        assert folder.block(f"unet.{own}.weight") == label, own


def test_text_encoders_and_constants_are_base_and_the_autoencoder_is_a_block():
    for names in product(SD1.values(), SDXL.values()):
        blocks = Blocks.of(names[0])
        assert blocks.block("cond_stage_model.transformer.text_model.final_layer_norm.weight") == "BASE"
        assert blocks.block("text_encoder.text_model.final_layer_norm.weight") == "BASE"
        assert blocks.block("conditioner.embedders.1.model.logit_scale") == "BASE"
        assert blocks.block("alphas_cumprod") == "BASE"
        assert blocks.block("first_stage_model.decoder.up.0.block.0.conv1.weight") == "VAE"
        assert blocks.block("vae.encoder.down_blocks.0.resnets.0.conv1.weight") == "VAE"


def test_the_autoencoders_own_levels_are_not_taken_for_the_unets():
    deeper = [f"vae.{side}.{way}_blocks.5.resnets.7.x" for side, way in (("encoder", "down"), ("decoder", "up"))]
    assert Blocks.of([*deeper, *diffusers(4)]) == Blocks.of(diffusers(4))
    assert Blocks.of(deeper).kind is None


def test_a_lora_that_changes_attention_alone_tells_the_same_blocks():
    attention = [f"unet.down_blocks.{level}.attentions.{layer}.x.w" for level in range(3) for layer in range(2)]
    attention += [f"unet.up_blocks.{level}.attentions.{layer}.x.w" for level in (1, 2, 3) for layer in range(3)]
    assert Blocks.of(attention) == Blocks.of(diffusers(4))


def test_a_unet_of_other_size_is_counted_in_the_same_way():
    blocks = Blocks.of(diffusers(levels=2, layers=1))
    assert blocks.names == ("BASE", *IN[:4], "M00", *OUT[:4], "VAE")
    assert blocks.block("unet.down_blocks.0.downsamplers.0.conv.weight") == "IN02"
    assert blocks.block("unet.down_blocks.1.resnets.0.conv1.weight") == "IN03"
    assert blocks.block("unet.up_blocks.1.resnets.1.conv1.weight") == "OUT03"


def test_a_file_of_the_denoiser_alone_needs_no_prefix():
    bare = Blocks.of([name.removeprefix("unet.") for name in diffusers(4)])
    assert bare == Blocks.of(diffusers(4))
    assert bare.block("conv_out.weight") == "OUT11"
    assert bare.component("down_blocks.0.resnets.0.conv1.weight") == "unet"
    assert Blocks.of([name.removeprefix("model.diffusion_model.") for name in single_file(9)]).names == SDXL_LABELS


def test_names_of_no_known_network_are_in_no_block():
    blocks = Blocks.of(["w", "layers.0.weight"])
    assert (blocks.names, blocks.block("w"), blocks.component("w")) == ((), None, None)


STREAMS = {
    "Flux, single file": ["double_blocks.18.img_attn.qkv.weight", "single_blocks.37.linear1.weight"],
    "Flux, diffusers": [
        *("transformer.transformer_blocks.18.attn.to_q.weight", "transformer.single_transformer_blocks.37.attn.x"),
    ],
}


@pytest.mark.parametrize("layout", STREAMS)
def test_flux_has_19_blocks_of_two_streams_and_38_of_one(layout):
    blocks = Blocks.of(STREAMS[layout])
    assert len(blocks.names) == 61 + 1  # the list of 61 numbers that is in use has no autoencoder
    assert blocks.names[:4] == ("CLIP", "T5", "IN", "D00")
    assert [blocks.block(name) for name in STREAMS[layout]] == ["D18", "S37"]
    assert blocks.block("img_in.weight") == blocks.block("transformer.x_embedder.weight") == "IN"
    assert blocks.block("final_layer.linear.weight") == blocks.block("transformer.norm_out.linear.weight") == "OUT"
    assert blocks.block("text_encoders.clip_l.transformer.text_model.x") == "CLIP"
    assert blocks.block("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight") == "T5"
    assert blocks.component("text_encoders.t5xxl.transformer.shared.weight") == "text_encoder_2"
    assert blocks.block("some.other.weight") is None


def test_stable_diffusion_3_has_blocks_of_two_streams_only():
    for name in ("model.diffusion_model.joint_blocks.23.x_block.w", "transformer.transformer_blocks.23.attn.to_q.w"):
        blocks = Blocks.of([name])
        assert blocks.names == ("CLIP", "T5", "IN", *(f"D{number:02}" for number in range(24)), "OUT", "VAE")
        assert (blocks.block(name), blocks.component(name)) == ("D23", "transformer")
    assert blocks.component("text_encoders.t5xxl.transformer.shared.weight") == "text_encoder_3"
    assert blocks.block("model.diffusion_model.pos_embed") == "IN"


RELEASED = {
    "sd1": original.sd1(),
    "sd2": original.sd2(),
    "sdxl": original.sdxl(),
    "sdxl-refiner": original.sdxl_refiner(),
    "sd3-medium": original.sd3(),
    "sd35-medium": original.sd3("sd35-medium"),
    "sd35-large": original.sd3("sd35-large"),
    "flux-dev": original.flux_dev(),
    "flux-schnell": original.flux_dev(guided=False),
}
DEPTHS = {"sd3-medium": 24, "sd35-medium": 24, "sd35-large": 38, "flux-dev": 57, "flux-schnell": 57}


@pytest.mark.parametrize("model", RELEASED)
def test_every_tensor_of_a_released_model_has_one_block_and_component_in_either_layout(model):
    metas = original.metas(RELEASED[model])
    pieces = to_diffusers(metas).pieces
    folder = Assembled(Described(metas), pieces).metas
    single, other = Blocks.of(metas), Blocks.of(folder)
    assert single.names == other.names
    assert set(single.names) == {single.block(name) for name in metas} == {other.block(name) for name in folder}
    for name, parts in pieces.items():
        for part in parts:
            assert single.block(part.name) == other.block(name)
            assert single.component(part.name) == other.component(name) == name.partition(".")[0]
    if model in DEPTHS:
        assert len(single.names) == DEPTHS[model] + len(("CLIP", "T5", "IN", "OUT", "VAE"))


@pytest.mark.parametrize("model", RELEASED)
def test_the_denoiser_alone_has_the_same_blocks(model):
    metas = original.metas(RELEASED[model])
    whole = Blocks.of(metas)
    start = "model.diffusion_model."
    alone = {name.removeprefix(start): name for name in metas if name.startswith(start)}
    blocks = Blocks.of(alone)
    assert blocks.names == whole.names
    for bare, name in alone.items():
        assert (blocks.block(bare), blocks.component(bare)) == (whole.block(name), whole.component(name))


def test_the_embedded_model_has_the_blocks_of_stable_diffusion_1_and_a_tensor_in_each():
    names = [
        f"{folder.name}.{name}"
        for folder in Path(tuner.base.__path__[0], "pocket").iterdir()
        for file in folder.glob("*.safetensors")
        for name in SafetensorsFile(file).metas
    ]
    blocks = Blocks.of(names)
    assert blocks.names == SD1_LABELS
    assert {blocks.block(name) for name in names} == set(SD1_LABELS)
    assert {blocks.component(name) for name in names} == {"unet", "vae", "text_encoder"}


COMPONENTS = {
    "unet.conv_in.weight": "unet",
    "model.diffusion_model.input_blocks.0.0.weight": "unet",
    "vae.decoder.conv_in.weight": "vae",
    "first_stage_model.quant_conv.weight": "vae",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "vae",
    "text_encoder.text_model.embeddings.token_embedding.weight": "text_encoder",
    "text_model.embeddings.token_embedding.weight": "text_encoder",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "text_encoder",
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": "text_encoder",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "text_encoder",
    "conditioner.embedders.1.model.text_projection": "text_encoder_2",
    "conditioner.embedders.0.model.text_projection": "text_encoder_2",  # XL's refiner has no other
    "text_encoder_2.text_projection.weight": "text_encoder_2",
    "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias": "text_encoder_2",
    "text_encoder_3.shared.weight": "text_encoder_3",
    "model_ema.decay": "ema",
    "diffusion_model.middle_block.0.x": "unet",
    "alphas_cumprod": None,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_told_by_a_name_of_either_layout(name):
    assert Blocks.of(diffusers(4)).component(name) == COMPONENTS[name]
