"""Single files and folders of every family are the same pipeline, for this project and for stock diffusers."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.tuner.weights import original, pipelines
from tuner import cli
from tuner.errors import ConfigError, DataError, UnsafeError
from tuner.families.source import BaseModel
from tuner.weights import convert as module
from tuner.weights import facts, published
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_store
from tuner.weights.convert import convert
from tuner.weights.layouts import ldm
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

FOLDERS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
IDENTITY = {"sd35-medium": "text_encoder.text_projection.weight"}
"""diffusers' reader of single files puts an identity there, as the released files have one."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small pipeline of every released model."""
    place = tmp_path_factory.mktemp("pipelines")
    return {variant: pipelines.write(variant, place / variant) for variant in pipelines.SMALL}


@pytest.mark.parametrize("variant", pipelines.SMALL)
def test_a_folder_becomes_a_single_file_and_the_same_folder_again(variant: str, folders, tmp_path: Path) -> None:
    done = convert(folders[variant], tmp_path / "single.safetensors", layout="ldm")
    assert done.left_out == 0
    back = convert(tmp_path / "single.safetensors", tmp_path / "back", config=str(folders[variant]))
    one, other = open_store(folders[variant]), open_store(tmp_path / "back")
    assert one.metas.keys() == other.metas.keys() and back.tensors == len(one.metas)
    for name, meta in one.metas.items():
        assert other.metas[name] == meta and torch.equal(other.read(name), one.read(name)), name
    kept = {path.relative_to(folders[variant]) for path in folders[variant].rglob("*.*")}
    assert {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.*")} == kept
    for path in kept:
        if path.suffix != ".safetensors":
            theirs, ours = ((place / path).read_bytes() for place in (folders[variant], tmp_path / "back"))
            assert theirs == ours, path
    again = convert(tmp_path / "back", tmp_path / "again.safetensors", layout="ldm")
    assert again.bytes == done.bytes
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "single.safetensors").read_bytes()


@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl", "sd35-medium", "flux-dev"])
def test_stock_pipelines_draw_the_same_from_folder_single_file_and_folder_again(
    variant: str, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.loaders import single_file_model, single_file_utils

    if variant.startswith("flux"):  # its reader knows one width only
        text = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
        space = dict(vars(single_file_utils))
        exec(text.replace("inner_dim = 3072", "inner_dim = 32"), space)
        kind = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
        patched = {**kind, "checkpoint_mapping_fn": space["convert_flux_transformer_checkpoint_to_diffusers"]}
        monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", patched)
    single = tmp_path / "single.safetensors"
    convert(folders[variant], single, layout="ldm")
    convert(single, tmp_path / "back", config=str(folders[variant]))
    source = pipelines.opened(folders[variant])
    configs = pipelines.write_configs(variant, tmp_path / "configs")
    options = {"config": str(configs), "torch_dtype": torch.float32, "local_files_only": True}
    read = pipelines.ready(type(source).from_single_file(str(single), **options))
    given = open_store(folders[variant])
    seen: set[str] = set()
    for component in FOLDERS:
        for name, tensor in (getattr(read, component, None) or torch.nn.Module()).state_dict().items():
            own = canonical(component, name)
            if not name.endswith(("position_ids", "embed_tokens.weight")) and own != IDENTITY.get(variant):
                seen.add(own)
                assert torch.equal(tensor, given.read(own)), own
    assert seen == set(given.metas) - {IDENTITY.get(variant)}
    expected = pipelines.drawn(source)
    assert expected.std() > 0.01
    assert torch.equal(pipelines.drawn(pipelines.opened(tmp_path / "back")), expected)
    if variant in IDENTITY:
        read.text_encoder.text_projection.weight.data.copy_(given.read(IDENTITY[variant]))
    assert torch.allclose(pipelines.drawn(read), expected, atol=1e-4)


def test_layers_are_fused_and_taken_apart_without_holding_any_of_them(folders, tmp_path: Path) -> None:
    """Nothing is computed: a conversion copies runs of bytes, a few megabytes at a time, however large a tensor is."""
    convert(folders["flux-dev"], tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    made, left_out = module._laid_out(store, "diffusers")
    assert left_out == ()
    assert all(module._places(made, name) is not None for name in made.metas)
    back, _ = module._laid_out(open_store(folders["flux-dev"]), "ldm")
    assert all(module._places(back, name) is not None for name in back.metas)


@pytest.fixture(scope="module")
def small_release(tmp_path_factory: pytest.TempPathFactory, folders) -> tuple[Path, object]:
    """The configs of the small pipelines, and their lists of tensors."""
    place = tmp_path_factory.mktemp("shipped")
    for name in ("sd1-v.yaml", "sd2-v.yaml"):
        (place / name).write_bytes((published.FOLDER / name).read_bytes())
    lists: list[dict[str, list[int]]] = []
    components: dict[str, dict[str, int]] = {}
    for variant in (*pipelines.SMALL, "sd2-base"):
        pipelines.write_configs(variant, place / variant, tokenizers=False)
        components[variant] = {}
        for name, meta in open_store(folders[variant.removesuffix("-base")]).metas.items():
            component, _, own = name.partition(".")
            if component not in components[variant]:
                components[variant][component] = len(lists)
                lists.append({})
            lists[components[variant][component]][own] = list(meta.shape)
    return place, (lists, components)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, small_release: tuple[Path, object]) -> Path:
    """As if the small pipelines were the released models."""
    monkeypatch.setattr(published, "FOLDER", small_release[0])
    monkeypatch.setattr(published, "_lists", lambda: small_release[1])
    return small_release[0]


def texts(folder: Path) -> dict[str, dict[str, object]]:
    return {path: dict(config) for path, config in published.read(folder).items()}


@pytest.mark.parametrize("variant", ["sdxl", "sdxl-refiner", "sd35-large", "flux-schnell"])
def test_a_single_file_becomes_a_whole_folder_with_nothing_else_given(
    variant: str, shipped: Path, folders, tmp_path: Path
) -> None:
    convert(folders[variant], tmp_path / "single.safetensors", layout="ldm")
    done = convert(tmp_path / "single.safetensors", tmp_path / "back")
    assert done.notes == () and published.read(tmp_path / "back") == published.read(shipped / variant)
    assert open_store(tmp_path / "back").metas == open_store(folders[variant]).metas
    pipelines.opened(tmp_path / "back")


def test_what_is_not_in_a_single_file_is_null_in_the_folder(shipped: Path, folders, tmp_path: Path) -> None:
    convert(folders["sd3-medium"], tmp_path / "whole.safetensors", layout="ldm")
    whole = SafetensorsFile(tmp_path / "whole.safetensors")
    kept = {name: whole.read(name) for name in whole.metas if "t5xxl" not in name}
    save_safetensors(tmp_path / "less.safetensors", kept)
    done = convert(tmp_path / "less.safetensors", tmp_path / "less")
    assert done.notes[0].startswith("Not in the source: text_encoder_3; open the folder with")
    index = texts(tmp_path / "less")["model_index.json"]
    assert index["text_encoder_3"] == [None, None] and not (tmp_path / "less" / "text_encoder_3").exists()
    pipeline = pipelines.opened(tmp_path / "less", text_encoder_3=None)
    assert pipeline.text_encoder_3 is None and pipelines.drawn(pipeline).isfinite().all()
    start = "model.diffusion_model."
    kept = {name.removeprefix(start): whole.read(name) for name in whole.metas if name.startswith(start)}
    save_safetensors(tmp_path / "alone.safetensors", kept)
    done = convert(tmp_path / "alone.safetensors", tmp_path / "alone")
    assert "text_encoder, text_encoder_2, text_encoder_3, vae" in done.notes[0]
    assert set(open_store(tmp_path / "alone").metas) == {
        name for name in open_store(folders["sd3-medium"]).metas if name.startswith("transformer.")
    }


def scheduler(folder: Path) -> dict[str, object]:
    return texts(folder)["scheduler/scheduler_config.json"]


def with_scheduler(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    config = {**scheduler(target), **changes}
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("to_zero", [True, False])
def test_xl_that_predicts_velocity_says_so_in_marks_and_in_a_scheduler(
    to_zero: bool, shipped: Path, folders, tmp_path: Path
) -> None:
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if to_zero else {}
    given = with_scheduler(folders["sdxl"], tmp_path / "v", prediction_type="v_prediction", **changes)
    convert(given, tmp_path / "single.safetensors", layout="ldm")
    known = identify(SafetensorsFile(tmp_path / "single.safetensors").metas)
    assert (known.prediction, known.zero_terminal_snr) == ("v", to_zero)
    assert not (tmp_path / "single.yaml").exists()  # marks say it
    convert(tmp_path / "single.safetensors", tmp_path / "back")
    assert scheduler(tmp_path / "back") == scheduler(given)
    assert open_store(tmp_path / "back").metas == open_store(given).metas
    convert(tmp_path / "back", tmp_path / "again.safetensors", layout="ldm")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "single.safetensors").read_bytes()
    convert(folders["sdxl"], tmp_path / "plain.safetensors", layout="ldm")
    assert not identify(SafetensorsFile(tmp_path / "plain.safetensors").metas).marks


@pytest.mark.parametrize("variant", ["sd1", "sd2"])
def test_others_that_predict_velocity_say_so_in_a_yaml_and_a_header(
    variant: str, shipped: Path, folders, tmp_path: Path
) -> None:
    given = with_scheduler(folders[variant], tmp_path / "v", prediction_type="v_prediction")
    done = convert(given, tmp_path / "single.safetensors", layout="ldm")
    assert "single.yaml" in done.notes[0]
    content = yaml.safe_load((tmp_path / "single.yaml").read_text())
    assert content["model"]["params"]["parameterization"] == "v"
    assert content["model"]["params"]["unet_config"]["params"]["context_dim"] == {"sd1": 768, "sd2": 1024}[variant]
    convert(tmp_path / "single.safetensors", tmp_path / "by header")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    save_safetensors(tmp_path / "bare.safetensors", {name: store.read(name) for name in store.metas})
    (tmp_path / "bare.yaml").write_bytes((tmp_path / "single.yaml").read_bytes())
    convert(tmp_path / "bare.safetensors", tmp_path / "by yaml")
    for back in ("by header", "by yaml"):
        assert scheduler(tmp_path / back)["prediction_type"] == "v_prediction"
    assert published.read(tmp_path / "by yaml") == published.read(tmp_path / "by header")
    noise = with_scheduler(folders[variant], tmp_path / "noise", prediction_type="epsilon")
    assert convert(noise, tmp_path / "noise.safetensors", layout="ldm").notes == ()
    assert not (tmp_path / "noise.yaml").exists()


@pytest.mark.parametrize(("spread", "variant"), [(0.05, "sd2-base"), (0.2, "sd2")])
def test_what_stable_diffusion_2_predicts_is_told_from_a_layer_where_nothing_says_it(
    spread: float, variant: str, shipped: Path, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = with_scheduler(folders["sd2"], tmp_path / "noise", prediction_type="epsilon")
    convert(noise, tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    name = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"  # the last, of this small network
    monkeypatch.setattr(facts, "V_NORMS", {"unet.up_blocks.1.attentions.1.transformer_blocks.0.norm1.bias"})
    bias = torch.tensor([-spread, spread]).repeat(16)
    save_safetensors(tmp_path / "x.safetensors", {n: bias if n == name else store.read(n) for n in store.metas})
    done = convert(tmp_path / "x.safetensors", tmp_path / "x")
    assert published.read(tmp_path / "x") == published.read(shipped / variant)
    assert len(done.notes) == 1 and "seems to predict" in done.notes[0]
    other = {"sd2": "sd2-base", "sd2-base": "sd2"}[variant]
    assert f"--config {other}." in done.notes[0]
    convert(tmp_path / "x.safetensors", tmp_path / "y", config=other)
    assert scheduler(tmp_path / "y")["prediction_type"] == scheduler(shipped / other)["prediction_type"]


def test_stable_diffusion_2_loses_the_layer_that_nothing_reads_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipelines.TEXT, "num_hidden_layers", 23)
    folder = pipelines.write("sd2", tmp_path / "folder")
    made = convert(folder, tmp_path / "made.safetensors", layout="ldm")
    assert [note for note in made.notes if "stand-ins" in note] == [module.LAST_LAYER_MADE_UP]
    store = SafetensorsFile(tmp_path / "made.safetensors")
    rng = torch.Generator().manual_seed(0)
    start = "cond_stage_model.model."
    own = {name for name in store.metas if name.startswith((f"{start}transformer.resblocks.23.", f"{start}text_pro"))}
    own.add(f"{start}logit_scale")
    assert len(own) == 14
    tensors = {
        name: torch.randn(meta.shape, generator=rng) if name in own else store.read(name)
        for name, meta in store.metas.items()
    }
    save_safetensors(tmp_path / "original.safetensors", tensors)
    back = convert(tmp_path / "original.safetensors", tmp_path / "back", config=str(folder))
    assert [note for note in back.notes if "stand-ins" in note] == [module.LAST_LAYER_GONE] and back.left_out == 14
    one, other = open_store(folder), open_store(tmp_path / "back")
    assert one.metas == other.metas and all(torch.equal(one.read(name), other.read(name)) for name in one.metas)
    convert(tmp_path / "back", tmp_path / "again.safetensors", layout="ldm")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()
    again = SafetensorsFile(tmp_path / "again.safetensors")
    assert {name for name in again.metas if not torch.equal(again.read(name), tensors[name])} == own
    said: list[str] = []
    BaseModel(base=str(tmp_path / "original.safetensors"), config=str(folder)).locate(say=said.append)
    assert not any("stand-ins" in line for line in said)


def test_what_a_header_says_of_a_model_comes_along(folders, tmp_path: Path) -> None:
    """Title, author and licence are those of the weights, however they are laid out; a hash of other bytes is not."""
    said = {
        "modelspec.title": "Robots",
        "modelspec.license": "mit",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
    }
    more = {"modelspec.hash_sha256": "0x00", "modelspec.implementation": "diffusers", "secret": "/home/me"}
    given = Path(shutil.copytree(folders["sdxl"], tmp_path / "given"))
    weights = given / "unet" / "diffusion_pytorch_model.safetensors"
    store = SafetensorsFile(weights)
    save_safetensors(weights, {name: store.read(name) for name in store.metas}, {**said, **more, "format": "pt"})
    convert(given, tmp_path / "single.safetensors", layout="ldm")
    single = SafetensorsFile(tmp_path / "single.safetensors").metadata
    theirs = {"modelspec.implementation": "https://github.com/Stability-AI/generative-models", "format": "pt"}
    assert single == {**said, **theirs}
    convert(tmp_path / "single.safetensors", tmp_path / "back", config=str(given))
    back = SafetensorsFile(tmp_path / "back" / "unet" / weights.name).metadata
    assert back == {**said, "modelspec.implementation": "diffusers", "format": "pt"}
    assert SafetensorsFile(tmp_path / "back" / "vae" / weights.name).metadata == {"format": "pt"}


def test_averages_are_taken_on_demand(shipped: Path, folders, tmp_path: Path) -> None:
    convert(folders["sd1"], tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    own = {name: store.read(name) for name in store.metas}
    start = "model.diffusion_model."
    mean = {f"model_ema.{n[6:].replace('.', '')}": own[n] + 1 for n in own if n.startswith(start)}
    save_safetensors(tmp_path / "both.safetensors", {**own, **mean, "model_ema.decay": torch.tensor(0.9999)})
    plain = convert(tmp_path / "both.safetensors", tmp_path / "plain.safetensors", layout="diffusers")
    assert plain.left_out == len(mean) + 1
    done = convert(tmp_path / "both.safetensors", tmp_path / "mean.safetensors", layout="ldm", ema=True)
    assert done.tensors == len(own)
    taken = SafetensorsFile(tmp_path / "mean.safetensors")
    for name, tensor in own.items():
        assert torch.equal(taken.read(name), tensor + name.startswith(start))
    convert(tmp_path / "both.safetensors", tmp_path / "folder", ema=True)
    assert torch.equal(open_store(tmp_path / "folder").read("unet.conv_out.bias"), own[f"{start}out.2.bias"] + 1)
    with pytest.raises(DataError, match=r"single\.safetensors: holds no averages"):
        convert(tmp_path / "single.safetensors", tmp_path / "none.safetensors", ema=True)


def test_names_of_novelais_age_are_understood(shipped: Path, folders, tmp_path: Path) -> None:
    convert(folders["sd1"], tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    old = {name.replace("transformer.text_model.", "transformer."): store.read(name) for name in store.metas}
    assert len([name for name in old if "text_model" in name]) == 0
    torch.save({"state_dict": old}, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "folder")
    one, other = open_store(folders["sd1"]), open_store(tmp_path / "folder")
    assert one.metas == other.metas and all(torch.equal(one.read(name), other.read(name)) for name in one.metas)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_a_single_file_of_8_bits_becomes_a_folder(dtype: str, shipped: Path, folders, tmp_path: Path) -> None:
    convert(folders["flux-dev"], tmp_path / "single.safetensors", layout="ldm", dtype=dtype)
    store = SafetensorsFile(tmp_path / "single.safetensors")
    assert {str(meta.dtype) for meta in store.metas.values()} == {f"torch.{dtype}"}
    convert(tmp_path / "single.safetensors", tmp_path / "same")
    back, whole = open_store(tmp_path / "same"), open_store(folders["flux-dev"])
    for name, meta in whole.metas.items():
        rounded = whole.read(name).to(getattr(torch, dtype))
        assert back.metas[name].shape == meta.shape
        assert torch.equal(back.read(name).float(), rounded.float()), name


def test_scales_of_8_bit_weights_are_applied_before_layers_are_taken_apart(
    shipped: Path, folders, tmp_path: Path
) -> None:
    convert(folders["flux-dev"], tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    name = "model.diffusion_model.single_blocks.0.linear1"
    scaled = {each: store.read(each) for each in store.metas}
    scaled[f"{name}.weight"] = torch.ones_like(scaled[f"{name}.weight"]).to(torch.float8_e4m3fn)
    scaled |= {f"{name}.scale_weight": torch.tensor(0.25), "model.diffusion_model.scaled_fp8": torch.zeros(2)}
    save_safetensors(tmp_path / "scaled.safetensors", scaled)
    convert(tmp_path / "scaled.safetensors", tmp_path / "folder", dtype="bfloat16")
    back = open_store(tmp_path / "folder")
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        assert back.read(f"transformer.single_transformer_blocks.0.{part}.weight").unique().tolist() == [0.25]


def test_a_folder_is_cast_into_a_folder_with_all_that_is_beside_the_weights(folders, tmp_path: Path) -> None:
    convert(folders["sd1"], tmp_path / "half", dtype="float16")
    assert published.read(tmp_path / "half") == published.read(folders["sd1"])
    assert {meta.dtype for meta in open_store(tmp_path / "half").metas.values()} == {torch.float16}
    assert (tmp_path / "half" / "tokenizer" / "vocab.json").is_file()
    pipelines.opened(tmp_path / "half")


def test_what_cannot_become_a_folder_is_refused_and_nothing_is_left(shipped: Path, folders, tmp_path: Path) -> None:
    single = tmp_path / "single.safetensors"
    convert(folders["sd1"], single, layout="ldm")
    store = SafetensorsFile(single)
    own = {name: store.read(name) for name in store.metas}
    part = {name: tensor for name, tensor in own.items() if "middle_block.0" not in name}
    save_safetensors(tmp_path / "part.safetensors", part)
    save_safetensors(tmp_path / "wide.safetensors", {**own, "first_stage_model.quant_conv.bias": torch.zeros(99)})
    save_safetensors(tmp_path / "other.safetensors", {"emb_params": torch.zeros(2, 768)})
    save_safetensors(tmp_path / "lora.safetensors", {"lora_unet_conv_in.lora_down.weight": torch.zeros(4, 4, 3, 3)})
    target = tmp_path / "folder"
    for name, said in {
        "part": r"part\.safetensors: 'unet\.mid_block\.resnets\.0\.\S+: is missing",
        "wide": r"wide\.safetensors: 'vae\.quant_conv\.bias': of shape \[99\], expected \[8\]",
        "other": r"other\.safetensors: 'emb_params': no name",
        "lora": r"lora\.safetensors: a LoRA for an unknown network: its names",
    }.items():
        with pytest.raises(DataError, match=said):
            convert(tmp_path / f"{name}.safetensors", target)
    for options, said in {
        ("config", "sd3"): "'sd3': no published model",
        ("config", str(shipped)): r"--config: .*model_index\.json: is missing",
        ("layout", "ldm"): "a folder has diffusers' names",
    }.items():
        with pytest.raises(ConfigError, match=said):
            convert(single, target, **{options[0]: options[1]})
    with pytest.raises(DataError, match="text_encoder_2: has no place in a folder of a StableDiffusionPipeline"):
        convert(folders["sdxl"], target, config=str(shipped / "sd1"))
    with pytest.raises(ConfigError, match="a file has no configs"):
        convert(single, tmp_path / "x.safetensors", config="sd1")
    assert not target.exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_is_there_is_replaced_on_demand_and_only_if_it_is_a_model(
    shipped: Path, folders, tmp_path: Path
) -> None:
    single = tmp_path / "single.safetensors"
    convert(folders["sd1"], single, layout="ldm")
    target = tmp_path / "folder"
    target.mkdir()
    convert(single, target)  # an empty one is nobody's
    before = (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is there already; choose another name, or say --overwrite"):
        convert(single, target)
    convert(single, target, overwrite=True)
    assert (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="is read from"):
        convert(target, target, overwrite=True)
    with pytest.raises(ConfigError, match="is read from"):
        convert(target / "unet", target, overwrite=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="is no model's folder"):
        convert(single, tmp_path / "papers", overwrite=True)
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "years"


def test_the_command_writes_folders_and_says_what_it_did(
    shipped: Path, folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single, target = str(tmp_path / "single.safetensors"), str(tmp_path / "folder")
    assert cli.main(["convert", str(folders["flux-dev"]), single, "--layout", "ldm"]) == 0
    assert cli.main(["convert", single, target, "--layout", "diffusers", "--dtype", "bfloat16"]) == 0
    size = sum(path.stat().st_size for path in Path(target).rglob("*.safetensors")) / 1e6
    count = len(open_store(folders["flux-dev"]).metas)
    assert capsys.readouterr().out.endswith(f"{target}: {count} tensors of Flux dev, {size:.1f} MB\n")
    assert cli.main(["convert", single, target + "-2", "--ema"]) == 3
    assert "holds no averages" in capsys.readouterr().err
    assert cli.main(["convert", single, target + "-2", "--config", "sd9"]) == 2
    assert "no published model" in capsys.readouterr().err


def test_the_network_that_guesses_depth_is_left_out_and_said(tmp_path: Path) -> None:
    shapes = original.unet(width=4, context=6, conv=False, channels=5) | {"depth_model.model.scratch.weight": (3,)}
    save_safetensors(tmp_path / "depth.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})
    done = convert(tmp_path / "depth.safetensors", tmp_path / "unet.safetensors", layout="diffusers")
    assert (done.left_out, done.architecture) == (1, "Stable Diffusion 2 for depth")
    assert len(done.notes) == 1 and "Intel/dpt-hybrid-midas" in done.notes[0]


def test_an_autoencoder_alone_becomes_a_folder_of_the_model_that_is_named(
    shipped: Path, folders, tmp_path: Path
) -> None:
    convert(folders["flux-dev"], tmp_path / "single.safetensors", layout="ldm")
    store = SafetensorsFile(tmp_path / "single.safetensors")
    own = {name.removeprefix("vae."): store.read(name) for name in store.metas if name.startswith("vae.")}
    save_safetensors(tmp_path / "ae.safetensors", own)
    with pytest.raises(DataError, match=r"ae\.safetensors: an autoencoder alone: no released model is like it \(there"):
        convert(tmp_path / "ae.safetensors", tmp_path / "folder")
    convert(tmp_path / "ae.safetensors", tmp_path / "folder", config="flux-dev")
    whole = open_store(folders["flux-dev"])
    back = open_store(tmp_path / "folder")
    assert set(back.metas) == {name for name in whole.metas if name.startswith("vae.")}
    assert all(torch.equal(back.read(name), whole.read(name)) for name in back.metas)


def parts(single: SafetensorsFile, folder: Path, prefixes: dict[str, str]) -> dict[str, Path]:
    """Files of one component each, with nothing in front of their names, as ComfyUI loads them."""
    found: dict[str, Path] = {}
    for name, prefix in prefixes.items():
        own = {key.removeprefix(prefix): single.read(key) for key in single.metas if key.startswith(prefix)}
        own |= {"logit_scale": torch.ones(())} if "clip" in name else {}
        own |= {"text_projection.weight": torch.ones(4, 4)} if name == "clip_l of Flux" else {}
        save_safetensors(folder / f"{name}.safetensors", own)
        found[name] = folder / f"{name}.safetensors"
    return found


APART = {
    "flux-dev": {
        "network": "model.diffusion_model.",
        "ae": "vae.",
        "clip_l of Flux": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    },
    "sd35-large": {
        "network": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    },
}


@pytest.mark.parametrize("variant", APART)
def test_files_of_one_component_each_become_a_whole_folder_or_file(
    variant: str, shipped: Path, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm, "OPEN_CLIP_G_WIDTH", 48)  # of these small pipelines
    convert(folders[variant], tmp_path / "single.safetensors", layout="ldm")
    files = parts(SafetensorsFile(tmp_path / "single.safetensors"), tmp_path, APART[variant])
    network, *others = files.values()
    done = convert(network, tmp_path / "folder", add=others)
    assert done.notes == () and published.read(tmp_path / "folder") == published.read(shipped / variant)
    one, other = open_store(folders[variant]), open_store(tmp_path / "folder")
    assert one.metas == other.metas and all(torch.equal(one.read(name), other.read(name)) for name in one.metas)
    convert(network, tmp_path / "all.safetensors", add=others)
    whole, all_in_one = (SafetensorsFile(tmp_path / f"{name}.safetensors") for name in ("single", "all"))
    assert whole.metas == all_in_one.metas
    assert all(torch.equal(whole.read(name), all_in_one.read(name)) for name in whole.metas)
    with pytest.raises(DataError, match=rf"{others[0].name}: adds nothing, as vae is there already"):
        convert(tmp_path / "single.safetensors", tmp_path / "more.safetensors", add=others[:1])
    with pytest.raises(ConfigError, match="is read from"):
        convert(network, others[0], add=others, overwrite=True)
    assert not (tmp_path / "more.safetensors").exists()


def test_a_tensor_by_two_names_is_refused(folders, tmp_path: Path) -> None:
    whole = open_store(folders["sd1"])
    own = {name: whole.read(name) for name in whole.metas}
    old = "text_encoder.embeddings.token_embedding.weight"
    save_safetensors(tmp_path / "x.safetensors", {**own, old: torch.ones(1)})
    with pytest.raises(DataError, match=f"'{old}' and .*: one tensor by two names"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", config=str(folders["sd1"]))


VELOCITY, NOISE = 'model:\n  params:\n    parameterization: "v"\n', "model:\n  params:\n    linear_start: 0.1\n"
UNET = "    unet_config:\n      params:\n        {}\n    first_stage_config:\n      ddconfig:\n        in_channels: 3\n"


@pytest.mark.parametrize(
    ("predicts", "text", "said"),
    [
        ("v_prediction", NOISE, "predicts noise, but it predicts velocity"),
        ("v_prediction", "mine", "predicts noise, but it predicts velocity"),
        ("epsilon", VELOCITY, "predicts velocity, but it predicts noise"),
        ("epsilon", NOISE + UNET.format("context_dim: 1024"), "is Stable Diffusion 2, but it is Stable Diffusion 1"),
        ("epsilon", NOISE + UNET.format("in_channels: 9"), "has 9 input channels, but it has 4"),
        ("v_prediction", VELOCITY + UNET.format("context_dim: 768"), None),
        ("epsilon", NOISE + UNET.format("in_channels: 4"), None),
    ],
)
def test_a_yaml_that_is_there_and_says_something_else_is_never_left_beside_the_new_file(
    predicts: str, text: str, said: str | None, shipped: Path, folders, tmp_path: Path
) -> None:
    """User interfaces believe it; what the user has written is not written over either."""
    given = with_scheduler(folders["sd1"], tmp_path / "given", prediction_type=predicts)
    target = tmp_path / "single.safetensors"
    target.write_bytes(b"older")
    (tmp_path / "single.yaml").write_text(text)
    if said is None:
        convert(given, target, layout="ldm", overwrite=True)
    else:
        with pytest.raises(ConfigError, match=rf"single\.yaml: is there already, and .* {said}; remove it"):
            convert(given, target, layout="ldm", overwrite=True)
        assert target.read_bytes() == b"older"
    assert (tmp_path / "single.yaml").read_text() == text


def test_our_own_yaml_goes_with_the_file_that_it_was_written_for(shipped: Path, folders, tmp_path: Path) -> None:
    target, beside = tmp_path / "single.safetensors", tmp_path / "single.yaml"
    velocity = with_scheduler(folders["sd1"], tmp_path / "v", prediction_type="v_prediction")
    noise = with_scheduler(folders["sd1"], tmp_path / "noise", prediction_type="epsilon")
    convert(velocity, target, layout="ldm")
    written = beside.read_bytes()
    assert "single.yaml is removed" in convert(noise, target, layout="ldm", overwrite=True).notes[0]
    assert not beside.exists()
    convert(velocity, target, layout="ldm", overwrite=True)
    assert beside.read_bytes() == written
    assert convert(velocity, target, layout="ldm", overwrite=True).notes == ()
    target.unlink()
    with pytest.raises(ConfigError, match="predicts velocity, but it predicts noise"):  # it may be that of another file
        convert(noise, target, layout="ldm")


def test_no_file_from_outside_of_a_folder_is_copied(folders, tmp_path: Path) -> None:
    given = with_scheduler(folders["sd1"], tmp_path / "given")
    (tmp_path / "secret.txt").write_text("secret")
    (given / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UnsafeError, match=r"notes\.txt: a link that leads out"):
        convert(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
