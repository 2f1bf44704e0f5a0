"""Numbers that vary: by block, by preset, by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from merge.blocks import Blocks
from merge.coefficients import Number, Varying, check, fixed, resolve
from merge.methods.base import MergeMethod, Space
from merge.presets import curve
from tests.merge.test_blocks import SD1, SDXL
from tuner.config.loader import load
from tuner.config.writer import to_toml
from tuner.errors import ConfigError

TEXT = "text_encoder.text_model.final_layer_norm.weight"
VAE = "vae.decoder.conv_in.weight"
NAMES = [*SD1["diffusers"], TEXT, VAE]
BLOCKS = Blocks.of(NAMES)
CONV_IN, IN04, MIDDLE = "unet.conv_in.weight", "unet.down_blocks.1.resnets.0.conv1.weight", NAMES[4]


@dataclass(frozen=True, kw_only=True)
class Mix(MergeMethod):
    """A method with numbers, as others have them."""

    takes: ClassVar[tuple[Space, ...]] = (Space.WEIGHT,)
    repeats: ClassVar[bool] = True
    gives: ClassVar[Space] = Space.WEIGHT

    t: Number = 0.5
    weights: tuple[Number, ...] = ()
    density: float = 1.0


def number(varying: Varying, name: str, blocks: Blocks = BLOCKS) -> float:
    return fixed(resolve(Mix(t=varying), name, blocks).t)


# Reading


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["t=0.3"], Mix(t=0.3)),
        (["t=1"], Mix(t=1.0)),
        (["t.default=1", "t.blocks.IN04=0.8"], Mix(t=Varying(default=1.0, blocks={"IN04": 0.8}))),
        (["t={preset='GRAD_V'}"], Mix(t=Varying(preset="GRAD_V"))),
        (
            ["t={preset='GRAD_V', blend='COSINE', share=0.3, names=[['*.attn2.*', 0], ['a', 1]]}"],
            Mix(t=Varying(preset="GRAD_V", blend="COSINE", share=0.3, names=(("*.attn2.*", 0.0), ("a", 1.0)))),
        ),
        (["weights=[1, {preset='ALL_B'}, 0.5]"], Mix(weights=(1.0, Varying(preset="ALL_B"), 0.5))),
    ],
)
def test_a_number_or_a_table_is_read_and_written_back(tmp_path: Path, overrides, expected):
    method = load(Mix, None, overrides)
    assert method == expected
    assert type(method.t) in (float, Varying)
    (tmp_path / "my.toml").write_text(to_toml(method))
    assert load(Mix, tmp_path / "my.toml") == method


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("t=half", "t: expected a number or a table, got 'half'"),
        ("t=inf", "t: expected a finite number or a table, got inf"),
        ("t={}", "t: says nothing; give a default, a preset, blocks or names"),
        ("t={preset='GRAD_W'}", "t: preset: no preset 'GRAD_W'; did you mean 'GRAD_V'?"),
        ("t={preset='GRAD_V', blend='COSIN'}", "t: blend: no preset 'COSIN'; did you mean 'COSINE'?"),
        ("t={default=1, blend='COSINE'}", "t: blend: there is nothing to blend with; give a preset too"),
        ("t={preset='COSINE', share=1}", "t: share: there is nothing to share with; give a blend too"),
        ("t={preset='COSINE', blend='GRAD_V', share=1.5}", "t: share: must be between 0 and 1, got 1.5"),
        ("t={prset='COSINE'}", "t.prset: unknown key; did you mean 'preset'?"),
        ("t={blocks={IN00='a'}}", "t.blocks.IN00: expected a number, got 'a'"),
        ("weights=[1, {share=1}]", "weights.1: share: there is nothing to share with; give a blend too"),
    ],
)
def test_a_mistake_is_told_with_its_field(override, message):
    with pytest.raises(ConfigError) as error:
        load(Mix, None, [override])
    assert str(error.value) == f"command line: {message}"


# Looking up


def test_a_pattern_comes_before_a_block_and_a_block_before_the_preset_and_that_before_the_default():
    said: dict[str, Any] = {"default": 0.1}
    assert number(Varying(**said), IN04) == 0.1
    said["preset"] = "FLAT_25"
    assert number(Varying(**said), IN04) == 0.25
    said["blocks"] = {"IN04": 0.3}
    assert (number(Varying(**said), IN04), number(Varying(**said), MIDDLE)) == (0.3, 0.25)
    said["names"] = (("unet.*", 0.4),)
    assert (number(Varying(**said), IN04), number(Varying(**said), TEXT)) == (0.4, 0)
    said["names"] = (("unet.*", 0.4), ("*conv?.weight", 0.5))
    assert (number(Varying(**said), IN04), number(Varying(**said), CONV_IN)) == (0.5, 0.4)


@pytest.mark.parametrize("layout", SD1)
def test_a_preset_is_the_same_in_both_layouts(layout):
    blocks = Blocks.of(SD1[layout])
    for name in SD1[layout]:
        assert number(Varying(preset="COSINE"), name, blocks) == curve("COSINE")[blocks.block(name) or ""]


def test_stable_diffusion_xl_takes_the_numbers_of_the_same_blocks():
    blocks = Blocks.of(SDXL["diffusers"])
    numbers = [Varying(preset="GRAD_V").at("", label) for label in blocks.names]
    of_sd1 = list(curve("GRAD_V").values())
    # without BASE, supermerger has them as w[:9] + w[12:22]; an autoencoder takes BASE's
    assert numbers == [of_sd1[0], *of_sd1[1:][:9], *of_sd1[1:][12:22], of_sd1[0]]


def test_two_presets_blend_by_their_share():
    first, second = curve("GRAD_V")["IN04"], curve("COSINE")["IN04"]
    blended = {share: number(Varying(preset="GRAD_V", blend="COSINE", share=share), IN04) for share in (0, 0.3, 1)}
    assert blended == pytest.approx({0: first, 0.3: 0.7 * first + 0.3 * second, 1: second})
    assert number(Varying(preset="GRAD_V", blend="COSINE"), IN04) == pytest.approx((first + second) / 2)


def test_an_autoencoder_takes_the_number_of_base_unless_it_has_its_own():
    assert number(Varying(blocks={"BASE": 0.2}), VAE) == number(Varying(blocks={"BASE": 0.2}), TEXT) == 0.2
    assert number(Varying(blocks={"BASE": 0.2, "VAE": 0.7}), VAE) == 0.7
    assert number(Varying(preset="ALL_B"), VAE) == 1


def test_numbers_in_a_tuple_are_resolved_one_by_one():
    method = Mix(weights=(1.0, Varying(blocks={"IN04": 0.3}, default=0.0), Varying(default=0.6)), density=0.9)
    assert resolve(method, IN04, BLOCKS) == Mix(weights=(1.0, 0.3, 0.6), density=0.9)
    assert resolve(method, MIDDLE, BLOCKS) == Mix(weights=(1.0, 0.0, 0.6), density=0.9)


def test_a_method_without_varying_numbers_is_itself():
    method = Mix(weights=(1.0, 2.0))
    assert resolve(method, IN04, BLOCKS) is method


def test_tensors_of_equal_numbers_have_equal_methods_so_that_they_can_be_merged_together():
    method = Mix(t=Varying(blocks={"IN04": 0.3}, default=0.0))
    assert len({resolve(method, name, BLOCKS) for name in NAMES}) == 2


def test_a_number_that_nothing_says_is_refused_when_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"^weights\.1: no number for 'x'; give a default$"):
        resolve(Mix(weights=(1.0, Varying(blocks={"IN04": 1.0}))), "x", Blocks.of(["x"]))


# Checking


@pytest.mark.parametrize(
    "varying",
    [
        Varying(default=0.5),
        Varying(preset="GRAD_V"),
        Varying(preset="GRAD_V", blocks={"VAE": 1.0}, names=(("*time_embedding*", 0.0),)),
        Varying(names=(("unet.*", 1.0), ("vae.*", 0.5), ("text_*", 0.0))),
    ],
)
def test_numbers_that_fit_pass(varying):
    check(Mix(t=varying, weights=(1.0, varying)), NAMES, BLOCKS)


@pytest.mark.parametrize(
    ("varying", "message"),
    [
        (
            Varying(default=0, blocks={"in04": 1}),
            r"step\.t\.blocks\.in04: no such block; did you mean 'IN04'\? .*VAE\)",
        ),
        (Varying(default=0, blocks={"OUT12": 1}), r"step\.t\.blocks\.OUT12: no such block; did you mean 'OUT\d\d'"),
        (
            Varying(default=0, names=(("unet.*", 1), ("*.attn3.*", 1))),
            r"step\.t\.names\.1: '\*\.attn3\.\*' fits none of",
        ),
        (
            Varying(blocks={"IN04": 1, "BASE": 1}),
            rf"step\.t: no number for \d+ of {len(NAMES)} tensors, such as 'unet\.conv_in\.weight' "
            r"\(in IN00, .*\); give a default",
        ),
    ],
)
def test_what_does_not_fit_a_network_is_refused_with_its_field_and_a_remedy(varying, message):
    with pytest.raises(ConfigError, match=f"^{message}[^\n]*$"):
        check(Mix(t=varying), NAMES, BLOCKS, path="step")


def test_every_misfit_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        check(
            Mix(t=Varying(default=0, blocks={"X": 1, "Y": 1}), weights=(0, Varying(names=(("y", 1),)))), NAMES, BLOCKS
        )
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["t.blocks.X", "t.blocks.Y", "weights.1.names.0", "weights.1"]


def test_blocks_and_presets_need_a_network_that_has_them():
    unknown, flux = ["a.weight"], ["transformer.single_transformer_blocks.0.x", "transformer.transformer_blocks.0.x"]
    by_block = Mix(t=Varying(default=0, blocks={"IN04": 1}))
    with pytest.raises(ConfigError, match=r"^t\.blocks\.IN04: the blocks of these tensors are not known; give patt"):
        check(by_block, unknown, Blocks.of(unknown))
    with pytest.raises(ConfigError, match=r"^t\.blocks\.IN04: no such block.*\(there are: CLIP, T5, IN, D00, S00, OUT"):
        check(by_block, flux, Blocks.of(flux))
    by_preset = Mix(t=Varying(default=0, preset="GRAD_V"))
    for names, what in ((unknown, "a network whose blocks are not known"), (flux, "a transformer")):
        with pytest.raises(
            ConfigError, match=rf"^t\.preset: 'GRAD_V' is a curve over a UNet's blocks.* this is {what};"
        ):
            check(by_preset, names, Blocks.of(names))
