"""Reading is strict: everything in a file is understood, or the file is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tuner.weights.adapters.memory import FILES, K_CONV, K_LINEAR, K_NORM, LINEAR, NETWORK, Memory, drawn
from tuner.errors import DataError
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.file import Adapters, parse_adapters, read_adapters
from tuner.weights.architecture import identify
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
N = torch.tensor
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def lora(name: str = K_LINEAR, ends: tuple[str, str] = KOHYA) -> dict[str, Tensor]:
    return {name + ends[0]: drawn(3, 8, seed=1), name + ends[1]: drawn(16, 3)}


def delta(adapters: Adapters, name: str = LINEAR) -> Tensor:
    change = adapters.changes[f"{name}.weight"]
    assert isinstance(change, Difference)
    return change.dense()


EXPECTED = drawn(16, 3).double() @ drawn(3, 8, seed=1).double()

INNER = "transformer_blocks.0.attn2.to_out.0"
UNET = f"unet.down_blocks.0.attentions.1.{INNER}"
OLD = UNET.replace("attn2.to_out.0", "attn2.processor.to_out")
SINGLE = f"input_blocks.2.1.{INNER}"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("spelling", "ends", "module"),
    [
        (K_LINEAR, KOHYA, TEXT),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, TEXT),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", KOHYA, TEXT),
        (TEXT, PEFT, TEXT),
        ("text_encoder.encoder.layers.0.mlp.fc1", PEFT, TEXT),
        ("encoder.layers.0.mlp.fc1", PEFT, TEXT),
        (TEXT, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), TEXT),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", PEFT, TEXT),
        (UNET, (".lora.down.weight", ".lora.up.weight"), UNET),
        (UNET, (".lora_A.default.weight", ".lora_B.default.weight"), UNET),
        (UNET.removeprefix("unet."), PEFT, UNET),
        (OLD, ("_lora.down.weight", "_lora.up.weight"), UNET),
        (OLD.removeprefix("unet."), ("_lora.down.weight", "_lora.up.weight"), UNET),
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0", KOHYA, UNET),
        ("lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_out_0", KOHYA, UNET),
        (f"diffusion_model.{SINGLE}", KOHYA, UNET),
        (f"diffusion_model.{SINGLE}", PEFT, UNET),
        (f"model.diffusion_model.{SINGLE}", PEFT, UNET),
    ],
)
def test_every_spelling_of_a_module_is_read(spelling: str, ends: tuple[str, str], module: str) -> None:
    read = parse_adapters(Memory(lora(spelling, ends)), Modules(NETWORK, {UNET: SINGLE}))
    assert list(read.changes) == [f"{module}.weight"]
    assert torch.allclose(delta(read, module), EXPECTED)


def test_a_files_own_spelling_is_kept_while_no_network_is_known() -> None:
    assert list(parse_adapters(Memory(lora())).changes) == [f"{K_LINEAR}.weight"]
    flat = lora("text_encoder.encoder.layers.0.mlp.fc1", PEFT)
    assert list(parse_adapters(Memory(flat)).changes) == [f"{TEXT}.weight"]


def test_alpha_is_the_files_or_the_rank() -> None:
    without = lora()
    assert torch.allclose(delta(parse_adapters(Memory(without), MODULES)), EXPECTED)
    for alpha in (N(1.5), N([1.5]), N(1.5, dtype=torch.float16)):
        read = parse_adapters(Memory({**without, f"{K_LINEAR}.alpha": alpha}), MODULES)
        assert torch.allclose(delta(read), 0.5 * EXPECTED)
    named = lora("diffusion_model.in_proj", PEFT) | {"diffusion_model.in_proj.alpha": N(6.0)}
    assert torch.allclose(delta(parse_adapters(Memory(named)), "diffusion_model.in_proj"), 2 * EXPECTED)


def changed(kind: str, **change: Tensor | None) -> dict[str, Tensor]:
    """The file of a kind with tensors left out (None) or put in, by what follows the module's name."""
    file = dict(FILES[kind])
    spelling = next(iter(file)).partition(".")[0]
    for suffix, tensor in change.items():
        name = f"{spelling}.{suffix.replace('__', '.')}"
        if tensor is None:
            del file[name]
        else:
            file[name] = tensor
    return file


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({}, "no tensors"),
        (changed("lora", lora_up__weight=None), r"lacks up"),
        (changed("lora", lora_down__weight=None), r"lacks down"),
        (changed("lora", lora_up__weight=None, lora_down__weight=None), "without what it belongs to"),
        (changed("lora", lora_up__weight=drawn(16, 4)), r"\[16, 4\] and \[3, 8\] are not of one rank"),
        (changed("lora", lora_up__weight=drawn(16, 3, 3, 3)), "not of one rank"),
        (changed("lora", lora_up__weight=drawn(16, 3, 1, 1)), "not of one rank"),
        (changed("lora", lora_up__weight=drawn(16)), "not of one rank"),
        (changed("lora", lora_up__weight=torch.full((16, 3), float("nan"))), "1 holding NaN"),
        (changed("lora", lora_up__weight=torch.full((16, 3), float("inf"))), "1 holding NaN, infinity"),
        (changed("lora", lora_up__weight=torch.ones(16, 3, dtype=torch.int64)), "no floating-point"),
        (changed("lora", lora_up__weight=torch.zeros(16, 0)), "nothing"),
        (changed("lora", alpha=N([1.0, 2.0])), r"alpha of shape \[2\]"),
        (changed("lora", alpha=N(float("nan"))), "NaN"),
        (changed("lora", lora_A__weight=drawn(3, 8)), "twice in two ways"),
        (changed("lora", hada_w1_a=drawn(3, 8)), "of the kinds hada and lora at once"),
        (changed("lora", lora_magic__weight=drawn(3, 8)), "no part of an adapter that is known: .*lora_magic"),
        (changed("lora", weight=drawn(3, 8)), "of the kinds ia3 and lora at once"),
        ({"unet.conv_in.weight": drawn(8, 4, 3, 3)}, "no part of an adapter that is known: 'unet.conv_in.weight'"),
        ({"lora_unet_conv_in.a1.weight": drawn(8, 4)}, "lacks a2 and b1 and b2"),
        (changed("glora", **{"b1__weight": drawn(16, 4)}), "not of one rank"),
        (changed("lora", bias_values=drawn(16)), "no part of an adapter that is known"),
        (changed("locon with a middle", lora_down__weight=drawn(3, 8, 3, 3)), "both have a kernel"),
        (changed("locon with a middle", lora_mid__weight=drawn(4, 3, 3, 3)), "not of one rank"),
        (changed("loha", hada_w2_b=None), "lacks w2_b"),
        (changed("loha", hada_w2_b=drawn(3, 9)), r"\[16, 8\] and \[16, 9\]"),
        (changed("loha", hada_w1_a=drawn(16, 4)), "not of one rank"),
        (changed("loha with cores", hada_t1=None), "too many|lacks"),
        (changed("lokr", lokr_w1=None), "lacks"),
        (changed("lokr", lokr_w2=drawn(4, 4)), "too many|lacks"),
        (changed("lokr", lokr_w1=drawn(4, 2, 3, 3)), "expected a matrix"),
        (changed("lokr of whole factors", lokr_w2=drawn(4)), "expected a matrix"),
        (changed("dora", dora_scale=drawn(7)), r"a magnitude of shape \[7\]"),
        (changed("full", dora_scale=drawn(16, 1, 1, 1), diff=None), "without what it belongs to"),
        ({f"{K_CONV}.diff": N(1.0)}, "expected a weight's or a bias'"),
        ({f"{K_NORM}.alpha": N(1.0)}, "alpha without what it belongs to"),
        (changed("oft", oft_blocks=drawn(4, 4, 3)), "expected square ones"),
        (changed("oft", rescale=drawn(5)), "5 factors for 16 outputs"),
        (changed("boft", oft_blocks=drawn(3, 3, 3, 3)), "no butterfly"),
    ],
)
def test_what_is_not_a_whole_adapter_is_refused(file: dict[str, Tensor], words: str) -> None:
    for modules in (MODULES, None):
        with pytest.raises(DataError, match=words):
            parse_adapters(Memory(file), modules, place="some.safetensors")


def test_modules_that_the_network_has_not_got_are_named_up_to_five_and_counted() -> None:
    file = {**FILES["lora"]}
    for number in range(7):
        file |= lora(f"lora_unet_nowhere_{number}")
    with pytest.raises(DataError) as raised:
        parse_adapters(Memory(file), MODULES, place="some.safetensors")
    text = str(raised.value)
    assert text.startswith("some.safetensors: 7 of its modules are not in the network: 'lora_unet_nowhere_0', ")
    assert "'lora_unet_nowhere_4' and 2 more; " in text and "nowhere_5" not in text


def test_two_spellings_of_one_module_are_refused() -> None:
    with pytest.raises(DataError, match="are one module"):
        parse_adapters(Memory(lora() | lora(TEXT, PEFT)), MODULES)


def test_a_spelling_that_could_be_two_modules_is_refused() -> None:
    modules = Modules(["unet.a.b", "unet.a_b"])
    with pytest.raises(DataError, match="several modules"):
        parse_adapters(Memory(lora("lora_unet_a_b")), modules)
    assert list(parse_adapters(Memory(lora("unet.a_b")), modules).changes) == ["unet.a_b.weight"]


def write(
    folder: Path, file: dict[str, Tensor], *, config: object = None, header: object = None, raw: str = ""
) -> Path:
    path = folder / "adapter_model.safetensors"
    texts = {} if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file(file, path, {"format": "pt", **texts})
    if config is not None or raw:
        (folder / "adapter_config.json").write_text(raw or json.dumps(config), encoding="utf-8")
    return path


PEFT_FILE = lora("base_model.model.encoder.layers.0.mlp.fc1", PEFT)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"mlp.fc1": 1.5}}, 0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"fc2": 1.5}}, 2.0),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"^fc1": 1.5}}, 2.0),
    ],
)
def test_pefts_alpha_stands_in_its_config(tmp_path: Path, config: object, factor: float) -> None:
    write(tmp_path, PEFT_FILE, config=config)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert torch.allclose(delta(read_adapters(path, MODULES)), factor * EXPECTED)


def test_diffusers_alphas_stand_in_the_header(tmp_path: Path) -> None:
    file = lora(TEXT, PEFT) | lora(UNET, PEFT)
    path = write(tmp_path, file, header={"text_encoder.r": 3, "text_encoder.lora_alpha": 1.5})
    read = read_adapters(path, MODULES)
    assert torch.allclose(delta(read, TEXT), 0.5 * EXPECTED) and torch.allclose(delta(read, UNET), EXPECTED)


def test_pefts_file_without_its_config_is_refused_as_its_strength_is_unknown(tmp_path: Path) -> None:
    path = write(tmp_path, PEFT_FILE)
    with pytest.raises(DataError, match=r"says no alpha; put its adapter_config.json beside it"):
        read_adapters(path, MODULES)
    assert torch.allclose(delta(read_adapters(path, MODULES, alpha=6.0)), 2 * EXPECTED)


@pytest.mark.parametrize(
    "raw", ["{", "[]", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', '{"lora_alpha": 1, "alpha_pattern": {".*": 2}}']
)
def test_a_config_that_cannot_be_understood_is_refused(tmp_path: Path, raw: str) -> None:
    path = write(tmp_path, PEFT_FILE, raw=raw)
    with pytest.raises(DataError):
        read_adapters(path, MODULES)


def test_a_kohya_file_does_not_mind_a_config_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, FILES["lora"], config={"r": 3, "lora_alpha": 300})
    assert torch.allclose(delta(read_adapters(path, MODULES)), 0.5 * EXPECTED)


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_is_told_from_a_checkpoint_by_its_names(kind: str) -> None:
    assert identify(Memory(FILES[kind]).metas).lora
    if kind.startswith("lora") or kind in ("full", "norm"):
        spelled = {f"unet.{name}": tensor for name, tensor in FILES[kind].items()}
        assert identify(Memory(spelled).metas).lora
    for name in ("unet.to_q.oft_R.weight", "unet.to_q.ia3_l"):
        assert identify(Memory({name: drawn(4)}).metas).lora
    assert not identify(Memory({"unet.diff.weight": drawn(4), "unet.conv_in.weight": drawn(4)}).metas).lora


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(DataError):
            read_adapters(path, MODULES)
