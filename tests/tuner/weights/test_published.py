"""The configs and tokenizers that are shipped are those of the released models.

Run as a program, this file writes the lists of tensors anew: python -m tests.tuner.weights.test_published
"""

import hashlib
import json
import lzma
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tuner.weights import original
from tests.tuner.weights.test_architecture import Described
from tuner.errors import ConfigError, DataError
from tuner.weights import published
from tuner.weights.architecture import identify
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.ldm import to_diffusers
from tuner.weights.store import TensorMeta
from tuner.weights.tokenizers import END, clip_files, t5_files
from tuner.weights.views import Assembled

SINGLE_FILES = {
    "sd1": original.sd1(),
    "sd1-inpainting": original.sd1(9),
    "sd2": original.sd2(),
    "sd2-base": original.sd2(),
    "sd2-depth": original.sd2(5),
    "sd2-inpainting": original.sd2(9),
    "sd35-large": original.sd3("sd35-large"),
    "sd35-large-turbo": original.sd3("sd35-large"),
    "sd35-medium": original.sd3("sd35-medium"),
    "sd3-medium": original.sd3("sd3-medium"),
    "sdxl": original.sdxl(),
    "sdxl-inpainting": original.sdxl(9),
    "sdxl-refiner": original.sdxl_refiner(),
    "flux-dev": original.flux_dev(),
    "flux-schnell": original.flux_dev(guided=False),
}


def folder_metas(variant: str) -> dict[str, TensorMeta]:
    metas = original.metas(SINGLE_FILES[variant])
    return dict(Assembled(Described(metas), to_diffusers(metas).pieces).metas)


def test_every_released_model_is_there() -> None:
    assert published.variants() == sorted(SINGLE_FILES)


def lists() -> dict[str, object]:
    """What `tensors.json.xz` holds: each list once, and which of them a variant's components have."""
    found: list[dict[str, list[int]]] = []
    components: dict[str, dict[str, int]] = {}
    for variant in SINGLE_FILES:
        own: dict[str, dict[str, list[int]]] = {}
        for name, meta in sorted(folder_metas(variant).items()):
            component, _, rest = name.partition(".")
            own.setdefault(component, {})[rest] = list(meta.shape)
        found += [each for each in own.values() if each not in found]
        components[variant] = {component: found.index(each) for component, each in own.items()}
    return {"components": components, "lists": found}


def test_the_lists_that_are_shipped_are_made_of_the_single_files() -> None:
    assert json.loads(lzma.decompress((published.FOLDER / "tensors.json.xz").read_bytes())) == lists()


@pytest.mark.parametrize("variant", SINGLE_FILES)
def test_a_folder_of_the_released_model_has_the_tensors_of_its_single_file(variant: str) -> None:
    metas = folder_metas(variant)
    assert published.tensors(variant) == {name: meta.shape for name, meta in metas.items()}
    published.check(variant, metas)
    assert variant.startswith(identify(metas).variant or "sd2")


@pytest.mark.parametrize("variant", SINGLE_FILES)
def test_every_component_has_a_config_of_the_class_that_the_index_names(variant: str) -> None:
    configs = published.configs(variant)
    index = configs["model_index.json"]
    components = {name.partition(".")[0] for name in published.tensors(variant)}
    assert {path.partition("/")[0] for path in configs} == {"model_index.json", "scheduler", *components}
    for part in components:
        config = configs[f"{part}/config.json"]
        assert index[part][1] == (config.get("_class_name") or config["architectures"][0])
    assert index["scheduler"] == ["diffusers", configs["scheduler/scheduler_config.json"]["_class_name"]]
    tokenizers = {path.partition("/")[0] for path in published.tokenizers(configs)}
    assert tokenizers == {part.replace("text_encoder", "tokenizer") for part in components if "text" in part}
    missing = {part for part, names in index.items() if names == [None, None]}
    assert not missing & components


def distinct() -> dict[str, str]:
    """One path for each config that is like no other in what decides the tensors."""
    seen: dict[str, str] = {}
    for variant in SINGLE_FILES:
        for path, config in published.configs(variant).items():
            if path.endswith("/config.json"):
                numbers = {key: value for key, value in config.items() if not key.startswith("_")}
                for key in ("sample_size", "scaling_factor", "shift_factor", "force_upcast", "upcast_attention"):
                    numbers.pop(key, None)
                seen.setdefault(json.dumps(numbers, sort_keys=True), f"{variant}/{path}")
    return {place: key for key, place in seen.items()}


@pytest.mark.parametrize("place", distinct())
def test_the_network_of_a_config_has_just_the_tensors_of_the_released_model(place: str) -> None:
    variant, component, _ = place.split("/")
    network = built(variant, component)
    shapes = {
        canonical(component, name): tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.endswith(published.OPTIONAL)
    }
    listed = published.tensors(variant)
    assert shapes == {name: shape for name, shape in listed.items() if name.startswith(f"{component}.")}


def built(variant: str, component: str) -> nn.Module:
    """The component in full size, without values."""
    import diffusers
    import transformers

    configs = published.configs(variant)
    library, kind = configs["model_index.json"][component]
    config = configs[f"{component}/config.json"]
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, kind).from_config(config)
        own = transformers.T5Config if config["model_type"] == "t5" else transformers.CLIPTextConfig
        return getattr(transformers, kind)(own(**config))


def test_parts_of_a_model_or_more_than_it_are_refused_by_name() -> None:
    metas = folder_metas("sd1")
    some = {name: meta for name, meta in metas.items() if name.startswith("vae.")}
    published.check("sd1", some)  # a component alone
    lost = {name: meta for name, meta in metas.items() if "mid_block" not in name or "vae" in name}
    with pytest.raises(DataError, match=r"'unet\.mid_block\.\S+': is missing \(46 such of 1130\); it is no whole sd1"):
        published.check("sd1", lost)
    with pytest.raises(DataError, match=r"'unet\.x\.y': a sd1 has no such tensor \(1 such\)"):
        published.check("sd1", {**metas, "unet.x.y": TensorMeta((1,), torch.float16)})
    with pytest.raises(DataError, match=r"conv_in\.weight': of shape \[320, 9, 3, 3\], expected \[320, 4, 3, 3\]"):
        published.check("sd1", folder_metas("sd1-inpainting"))
    table = {"text_encoder.text_model.embeddings.position_ids": TensorMeta((1, 77), torch.int64)}
    published.check("sd1", {**metas, **table})


def test_an_unknown_name_is_met_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'sd2base': no published model; did you mean 'sd2-base'\?"):
        published.configs("sd2base")


def test_what_models_predict_is_in_their_schedulers() -> None:
    def said(variant: str) -> str:
        return published.configs(variant)["scheduler/scheduler_config.json"].get("prediction_type", "epsilon")

    assert [variant for variant in SINGLE_FILES if said(variant) == "v_prediction"] == ["sd2"]


def test_clips_files_are_the_published_ones() -> None:
    files = clip_files(END)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert digests["vocab.json"] == "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
    assert digests["merges.txt"] == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_t5s_files_are_the_published_ones() -> None:
    files = t5_files()
    digest = hashlib.sha256(files["spiece.model"]).hexdigest()
    assert digest == "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
    pipeline = json.loads(files["tokenizer.json"])
    assert len(pipeline["model"]["vocab"]) == 32100 and pipeline["model"]["vocab"][-1] == ["<extra_id_0>", 0.0]


@pytest.mark.parametrize(("variant", "pads"), [("sd1", [49407]), ("sd2", [0]), ("sdxl", [49407, 0])])
def test_texts_become_the_well_known_numbers(variant: str, pads: list[int], tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    for path, content in published.tokenizers(published.configs(variant)).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for pad, folder in zip(pads, sorted(tmp_path.iterdir()), strict=True):
        words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        numbers = words("A photo of a cat", padding="max_length").input_ids
        assert numbers == [49406, 320, 1125, 539, 320, 2368, 49407] + 70 * [pad] and len(words) == 49408


def test_t5_knows_its_words(tmp_path: Path) -> None:
    from transformers import T5TokenizerFast

    for path, content in t5_files().items():
        (tmp_path / path).write_bytes(content)
    words = T5TokenizerFast.from_pretrained(tmp_path, local_files_only=True)
    numbers = words("A photo of a cat, ﬁne … <extra_id_0>").input_ids
    assert numbers[:7] == [71, 1202, 13, 3, 9, 1712, 6] and numbers[-2:] == [32099, 1]
    assert words.decode(numbers, skip_special_tokens=True) == "A photo of a cat, fine..."
    assert (len(words), words.pad_token_id, words.model_max_length) == (32100, 0, 512)


if __name__ == "__main__":
    content = json.dumps(lists(), separators=(",", ":")).encode()
    (published.FOLDER / "tensors.json.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
