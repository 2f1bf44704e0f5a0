"""Names are compared with two sources: lists made from the released files, and diffusers' own converters."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.weights import original
from tuner.errors import DataError
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.ldm import from_diffusers, single_file_modules, to_diffusers
from tuner.weights.store import Location, TensorMeta, TensorStore
from tuner.weights.views import Assembled
from tuner.weights.writer import save_safetensors

BASE = Path(__file__).parents[4] / "tuner" / "base" / "pocket"


class Memory:
    """A store of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.metas = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def locate(self, name: str) -> Location | None:
        return None


def filled(shapes: original.Shapes) -> Memory:
    generator = torch.Generator().manual_seed(0)
    return Memory({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def small(family: str) -> original.Shapes:
    """A network of the family's topology, a few numbers wide."""
    xl = "conditioner.embedders."
    vae = original.vae(width=2, latent=2)
    if family == "sd1":
        return original.unet(width=4, context=6) | vae | original.clip("cond_stage_model.transformer.", 4, 2)
    if family == "sdxl":
        unet = original.unet("model.diffusion_model.", 4, (1, 2, 4), (0, 2, 3), 3, 6, conv=False, sizes=5)
        return unet | vae | original.clip(f"{xl}0.transformer.", 4, 2) | original.open_clip(f"{xl}1.model.", 6, 2)
    unet = original.unet("model.diffusion_model.", 4, (1, 2, 4, 4), (0, 2, 2, 0), 2, 6, conv=False, sizes=5)
    return unet | vae | original.open_clip(f"{xl}0.model.", 6, 2)


def equal(left: TensorStore, right: TensorStore) -> bool:
    return left.metas == right.metas and all(torch.equal(left.read(name), right.read(name)) for name in left.metas)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner"])
def test_both_ways_are_inverse_bit_for_bit(family: str) -> None:
    file = filled(small(family))
    assert identify(file.metas).family == family
    there = to_diffusers(file.metas)
    folder = Assembled(file, there.pieces)
    assert (identify(folder.metas).family, identify(folder.metas).layout) == (family, "diffusers")
    back = from_diffusers(folder.metas)
    assert there.left_out == back.left_out == ()
    again = Assembled(folder, back.pieces)
    assert equal(again, file)
    assert equal(Assembled(again, to_diffusers(again.metas).pieces), folder)


def test_the_embedded_base_becomes_a_single_file_and_returns() -> None:
    folder = open_store(BASE)
    file = Assembled(folder, from_diffusers(folder.metas).pieces)
    assert (identify(file.metas).family, identify(file.metas).layout) == ("sd1", "ldm")
    located = [file.locate(name) is not None for name in file.metas]
    assert all(located)  # only names and shapes differ, so nothing needs to be computed
    back = Assembled(file, to_diffusers(file.metas).pieces)
    assert equal(back, folder)


def test_diffusers_opens_the_single_file_as_the_same_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = open_store(BASE)
    file = Assembled(folder, from_diffusers(folder.metas).pieces)
    save_safetensors(tmp_path / "single.safetensors", {name: file.read(name) for name in file.metas})
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "single.safetensors"),
        config=str(BASE),
        torch_dtype=torch.float16,
        safety_checker=None,
        local_files_only=True,
    )
    opened = {
        canonical(component, name): tensor
        for component in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipeline, component).state_dict().items()
        if not name.endswith("position_ids")
    }
    assert set(opened) == set(folder.metas)
    assert all(torch.equal(tensor, folder.read(name)) for name, tensor in opened.items())


def test_full_size_lists_are_translated_to_the_last_name() -> None:
    for shapes in (original.sd1(), original.sd1(channels=9), original.sdxl(), original.sdxl_refiner()):
        metas = original.metas(shapes)
        there = to_diffusers(metas)
        folder = Assembled(_Described(metas), there.pieces)
        back = from_diffusers(folder.metas)
        assert Assembled(folder, back.pieces).metas == metas
        used = {piece.name for pieces in there.pieces.values() for piece in pieces}
        assert used == set(metas) and not there.left_out


class _Described:
    """A store of which only the descriptions are there."""

    def __init__(self, metas: Mapping[str, TensorMeta]) -> None:
        self.metas = metas

    def read(self, name: str) -> Tensor:
        raise AssertionError

    def locate(self, name: str) -> Location | None:
        raise AssertionError


@pytest.fixture(scope="module")
def networks() -> dict[str, dict[str, nn.Module]]:
    """The components of Stable Diffusion 1.5 and XL in full size, without values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=1280))
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        unet_xl = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {
        "sd1": {"unet": unet, "vae": vae, "text_encoder": clip},
        "sdxl": {"unet": unet_xl, "vae": vae, "text_encoder": clip, "text_encoder_2": second},
    }


def folder_metas(components: Mapping[str, nn.Module]) -> dict[str, TensorMeta]:
    return {
        canonical(component, name): TensorMeta(tuple(tensor.shape), torch.float16)
        for component, network in components.items()
        for name, tensor in network.state_dict().items()
        if not name.endswith("position_ids")
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_networks_have_exactly_the_tensors_of_the_released_files(
    family: str, networks: dict[str, dict[str, nn.Module]]
) -> None:
    metas = folder_metas(networks[family])
    file = Assembled(_Described(metas), from_diffusers(metas).pieces)
    shapes = {name: meta.shape for name, meta in file.metas.items()}
    assert original.digest(shapes) == original.DIGESTS[family]
    assert Assembled(file, to_diffusers(file.metas).pieces).metas == metas


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_tensor_goes_where_diffusers_converter_puts_it(
    family: str, networks: dict[str, dict[str, nn.Module]]
) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    shapes = {"sd1": original.sd1(), "sdxl": original.sdxl()}[family]
    numbered = {name: torch.full((1,) * len(shape), index) for index, (name, shape) in enumerate(shapes.items())}
    pieces = to_diffusers(original.metas(shapes)).pieces
    for component, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        theirs = convert(dict(numbered), dict(networks[family][component].config))
        ours = {name.partition(".")[2]: made for name, made in pieces.items() if name.startswith(f"{component}.")}
        assert set(theirs) == set(ours)
        for name, (piece,) in ours.items():
            assert int(theirs[name].flatten()[0]) == int(numbered[piece.name].flatten()[0]), name


def test_an_open_clip_encoder_is_taken_apart_as_diffusers_does() -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    prefix = "conditioner.embedders.1.model."
    file = filled(original.open_clip(prefix, 6, 2))
    with torch.device("meta"):
        network = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=6, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        )
    theirs = convert_open_clip_checkpoint(network, dict(file.tensors), prefix)
    ours = Assembled(file, to_diffusers(file.metas).pieces)
    assert set(ours.metas) == {f"text_encoder_2.{name}" for name in theirs}
    assert all(torch.equal(ours.read(f"text_encoder_2.{name}"), tensor) for name, tensor in theirs.items())


def test_what_training_leaves_in_a_file_is_left_out_and_said() -> None:
    extra: original.Shapes = {
        "model_ema.decay": (),
        "model_ema.diffusion_modelout0bias": (320,),
        "alphas_cumprod": (1000,),
        "sqrt_one_minus_alphas_cumprod": (1000,),
        "betas": (1000,),
        "conditioner.embedders.1.model.logit_scale": (),
        "first_stage_model.loss.logvar": (),
    }
    kept: original.Shapes = {
        "v_pred": (0,),
        "ztsnr": (0,),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    }
    there = to_diffusers(original.metas({**small("sdxl"), **extra, **kept}))
    assert set(there.left_out) == set(extra)
    assert {"v_pred", "ztsnr", "text_encoder.text_model.embeddings.position_ids"} <= set(there.pieces)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_unet_or_autoencoder_alone_is_translated(prefix: str) -> None:
    shapes = original.unet(prefix, 4, context=6)
    there = to_diffusers(original.metas(shapes)).pieces
    assert len(there) == len(shapes) and all(name.startswith("unet.") for name in there)
    folder = Assembled(_Described(original.metas(shapes)), there).metas
    bare = {name.removeprefix("unet."): meta for name, meta in folder.items()}
    assert set(from_diffusers(bare).pieces) == set(original.unet(width=4))
    vae = to_diffusers(original.metas(original.vae("", 2))).pieces
    assert {name.partition(".")[0] for name in vae} == {"vae"} and len(vae) == 248
    own = open_store(BASE / "vae").metas
    assert set(from_diffusers(own).pieces) == {
        name for name in from_diffusers(open_store(BASE).metas).pieces if name.startswith("first_stage_model.")
    }


def test_an_older_clip_without_text_model_is_known() -> None:
    old = {name.replace("text_model.", ""): shape for name, shape in small("sd1").items()}
    assert set(to_diffusers(original.metas(old)).pieces) == set(to_diffusers(original.metas(small("sd1"))).pieces)


def test_stable_diffusion_2_is_read_and_not_written() -> None:
    metas = original.metas(original.sd2())
    folder = Assembled(_Described(metas), to_diffusers(metas).pieces)
    assert identify(folder.metas).family == "sd2"
    with pytest.raises(DataError, match="lacks a layer"):
        from_diffusers(folder.metas)


def test_modules_of_a_unet_are_named_as_in_single_files() -> None:
    shapes = small("sdxl")
    pieces = to_diffusers(original.metas(shapes)).pieces
    modules = single_file_modules(pieces)
    assert modules["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"] == (
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k"
    )
    assert modules["unet.up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert modules["unet.down_blocks.0.resnets.1.time_emb_proj"] == "input_blocks.2.0.emb_layers.1"
    own = {name.removeprefix("model.diffusion_model.").rpartition(".")[0] for name in shapes if "diffusion" in name}
    assert set(modules.values()) == own and len(modules) == len(own)


@pytest.mark.parametrize(
    "change",
    [
        {"model.diffusion_model.input_blocks.1.0.new_layer.weight": (4,)},
        {"model.diffusion_model.something.weight": (4,)},
        {"first_stage_model.encoder.something.weight": (4,)},
        {"conditioner.embedders.1.model.something": (4,)},
        {"something": (4,)},
    ],
)
def test_a_name_that_is_not_known_is_an_error(change: original.Shapes) -> None:
    with pytest.raises(DataError, match=r"something|new_layer"):
        to_diffusers(original.metas(small("sdxl") | change))


def test_what_cannot_be_said_in_a_single_file_is_an_error() -> None:
    metas = dict(Assembled(filled(small("sdxl")), to_diffusers(original.metas(small("sdxl"))).pieces).metas)
    lost = {name: meta for name, meta in metas.items() if not name.endswith("layers.1.self_attn.k_proj.weight")}
    with pytest.raises(DataError, match=r"text_encoder_2\.text_model\.encoder\.layers\.1\.self_attn\.k_proj\.weight"):
        from_diffusers(lost)
    extra = TensorMeta((4,), torch.float16)
    for name in ("unet.something.weight", "vae.something", "text_encoder_2.something", "image_encoder.x"):
        with pytest.raises(DataError, match=name):
            from_diffusers({**metas, name: extra})


def test_other_families_and_the_wrong_way_are_refused() -> None:
    single = original.metas(small("sd1"))
    folder = Assembled(_Described(single), to_diffusers(single).pieces).metas
    with pytest.raises(DataError, match="has diffusers names already"):
        to_diffusers(folder)
    with pytest.raises(DataError, match="has ldm names already"):
        from_diffusers(single)
    flux = original.metas(
        {f"{name}.weight": (4, 4) for name in ("double_blocks.0.img_attn.qkv", "vector_in.in_layer", "img_in")}
    )
    with pytest.raises(DataError, match="Flux: its names are not translated"):
        to_diffusers(flux)
