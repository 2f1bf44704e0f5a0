"""Names are compared with two sources: lists made from the released files, and diffusers' own converters."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.weights import original
from tuner.errors import DataError
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.ldm import averaged, from_diffusers, single_file_modules, to_diffusers
from tuner.weights.store import Location, TensorMeta, TensorStore
from tuner.weights.views import Assembled, Renamed
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


TEXT = "text_encoders."
TRANSFORMERS = ("sd3-medium", "sd35-medium", "sd35-large", "flux-dev", "flux-schnell")
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", *TRANSFORMERS)


def lacking(shapes: original.Shapes, *ends: str) -> original.Shapes:
    return {name: shape for name, shape in shapes.items() if not name.endswith(ends)}


def small(family: str) -> original.Shapes:
    """A network of the family's topology, a few numbers wide."""
    xl = "conditioner.embedders."
    vae = original.vae(width=2, latent=2)
    if family == "sd1":
        return original.unet(width=4, context=6) | vae | original.clip("cond_stage_model.transformer.", 4, 2)
    if family == "sd2":
        text = original.open_clip("cond_stage_model.model.", 4, 2)
        return original.unet(width=4, context=6, conv=False) | vae | lacking(text, "text_projection")
    if family in TRANSFORMERS:
        texts = original.clip(f"{TEXT}clip_l.transformer.", 4, 2) | original.t5(f"{TEXT}t5xxl.transformer.", 4, 2, 1, 6)
        if family.startswith("flux"):
            guided = family == "flux-dev"
            network = original.flux("model.diffusion_model.", 8, 2, 3, 4, 6, guided, context=4, pooled=4, out=6)
            return network | original.vae16("vae.", 2) | texts
        sizes = {"width": 8, "depth": 3, "head": 4, "positions": 4, "context": 4, "pooled": 10}
        normed, dual = family != "sd3-medium", 2 * (family == "sd35-medium")
        texts |= original.clip(f"{TEXT}clip_g.transformer.", 6, 3)
        texts |= {f"{TEXT}clip_{name}.transformer.text_projection.weight": (w, w) for name, w in (("l", 4), ("g", 6))}
        return original.mmdit(normed=normed, dual=dual, **sizes) | original.vae16(width=2) | texts
    if family == "sdxl":
        unet = original.unet("model.diffusion_model.", 4, (1, 2, 4), (0, 2, 3), 3, 6, conv=False, sizes=5)
        return unet | vae | original.clip(f"{xl}0.transformer.", 4, 2) | original.open_clip(f"{xl}1.model.", 6, 2)
    unet = original.unet("model.diffusion_model.", 4, (1, 2, 4, 4), (0, 2, 2, 0), 2, 6, conv=False, sizes=5)
    return unet | vae | original.open_clip(f"{xl}0.model.", 6, 2)


def equal(left: TensorStore, right: TensorStore) -> bool:
    return left.metas == right.metas and all(torch.equal(left.read(name), right.read(name)) for name in left.metas)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_are_inverse_bit_for_bit(family: str) -> None:
    file = filled(small(family))
    known = identify(file.metas)
    assert family in (known.family, known.variant)
    there = to_diffusers(file.metas)
    folder = Assembled(file, there.pieces)
    other = identify(folder.metas)
    assert (other.family, other.variant, other.layout) == (known.family, known.variant, "diffusers")
    assert other.components == known.components
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
    lists = [original.sd1(), original.sd1(channels=9), original.sdxl(), original.sdxl_refiner()]
    lists += [original.sd3(variant) for variant in TRANSFORMERS[:3]]
    lists += [original.flux_dev(), original.flux_dev(guided=False)]
    for shapes in lists:
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


def test_stable_diffusion_2_has_a_layer_more_in_a_single_file() -> None:
    prefix = "cond_stage_model.model."
    shapes = original.unet(width=4, context=6, conv=False) | original.open_clip(prefix, 4, 24)
    file = filled(shapes)
    there = to_diffusers(file.metas)
    last = {name for name in shapes if name.startswith(f"{prefix}transformer.resblocks.23.")}
    assert set(there.left_out) == {*last, f"{prefix}text_projection"} and len(last) == 12
    folder = Assembled(file, there.pieces)
    back = from_diffusers(folder.metas)
    again = back.of(folder)
    assert set(again.metas) == {*shapes, f"{prefix}logit_scale"}
    assert set(back.made_up) == {f"{prefix}text_projection", f"{prefix}logit_scale"}
    for name in shapes:  # the layer that nothing reads is the one before it, as sd-scripts writes it
        if name not in back.made_up:
            assert torch.equal(again.read(name), file.read(name.replace("resblocks.23.", "resblocks.22."))), name
    assert torch.equal(again.read(f"{prefix}text_projection"), torch.ones(4, 4))
    assert equal(Assembled(again, to_diffusers(again.metas).pieces), folder)
    metas = original.metas(original.sd2())
    made = from_diffusers(Assembled(_Described(metas), to_diffusers(metas).pieces).metas)
    assert {*made.pieces, *made.made_up} == {*metas, f"{prefix}logit_scale"}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("family", ["sd35-medium", "flux-dev"])
def test_a_transformer_alone_is_translated(family: str, prefix: str) -> None:
    start = "model.diffusion_model."
    own = {name.removeprefix(start): shape for name, shape in small(family).items() if name.startswith(start)}
    file = filled({prefix + name: shape for name, shape in own.items()})
    folder = Assembled(file, to_diffusers(file.metas).pieces)
    assert all(name.startswith("transformer.") for name in folder.metas)
    bare = Memory({name.removeprefix("transformer."): folder.read(name) for name in folder.metas})
    target = "" if family == "flux-dev" else start  # the files that their makers released
    for store in (folder, bare):
        again = Assembled(store, from_diffusers(store.metas).pieces)
        assert {target + name for name in own} == set(again.metas)
        assert all(torch.equal(again.read(target + name), file.read(prefix + name)) for name in own)


def test_what_others_add_to_files_of_transformers_is_left_out_and_said() -> None:
    extra: original.Shapes = {"model.model_sampling.sigmas": (1000,), "text_encoders.clip_g.logit_scale": ()}
    assert set(to_diffusers(original.metas({**small("sd3-medium"), **extra})).left_out) == set(extra)


def test_averages_are_taken_instead_of_the_weights_where_they_are_all_there() -> None:
    shapes = small("sd1")
    start = "model.diffusion_model."
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in shapes if start in name}
    file = filled({**shapes, **{average: shapes[name] for name, average in names.items()}, "model_ema.decay": ()})
    chosen = Renamed(file, averaged(file.metas))
    assert set(chosen.metas) == set(shapes)
    assert names[f"{start}out.2.weight"] == "model_ema.diffusion_modelout2weight"
    for name in shapes:
        assert torch.equal(chosen.read(name), file.read(names.get(name, name)))
    with pytest.raises(DataError, match="holds no averages"):
        averaged(original.metas(shapes))
    lost = {name: meta for name, meta in file.metas.items() if name != names[f"{start}out.2.bias"]}
    with pytest.raises(DataError, match=r"out\.2\.bias.*has no average"):
        averaged(lost)


@pytest.mark.parametrize("family", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_every_number_of_stable_diffusion_3_goes_where_diffusers_converter_puts_it(family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    _same_as(convert, family)


def test_every_number_of_flux_goes_where_diffusers_converter_puts_it() -> None:
    import inspect

    from diffusers.loaders import single_file_utils as theirs

    text = inspect.getsource(theirs.convert_flux_transformer_checkpoint_to_diffusers)
    assert text.count("inner_dim = 3072") == 1
    space = dict(vars(theirs))
    exec(text.replace("inner_dim = 3072", "inner_dim = 8"), space)  # its own text, for a network of another width
    for family in ("flux-dev", "flux-schnell"):
        _same_as(space["convert_flux_transformer_checkpoint_to_diffusers"], family)


def _same_as(convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], family: str) -> None:
    start = "model.diffusion_model."
    file = filled({name: shape for name, shape in small(family).items() if name.startswith(start)})
    ours = Assembled(file, to_diffusers(file.metas).pieces)
    theirs = convert({name: tensor.clone() for name, tensor in file.tensors.items()})
    assert {f"transformer.{name}" for name in theirs} == set(ours.metas)
    for name, tensor in theirs.items():
        assert torch.equal(ours.read(f"transformer.{name}"), tensor), name


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


@pytest.mark.parametrize(
    "twice",
    [
        "cond_stage_model.transformer.embeddings.token_embedding.weight",
        "vae.quant_conv.bias",
    ],
)
def test_a_tensor_that_is_there_by_two_names_is_an_error(twice: str) -> None:
    with pytest.raises(DataError, match=rf"and '{twice}': one tensor by two names"):
        to_diffusers(original.metas({**small("sd1"), twice: (4,)}))


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
    with pytest.raises(DataError, match="expected 3 layers' rows"):
        to_diffusers(flux)
    with pytest.raises(DataError, match="a mixture of Stable Diffusion 1 and Flux schnell: its names are not"):
        to_diffusers({**single, **original.metas(original.flux("", 8, 1, 1, guided=False))})
    with pytest.raises(DataError, match="a LoRA for"):
        to_diffusers(original.metas({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8, 1, 1)}))
