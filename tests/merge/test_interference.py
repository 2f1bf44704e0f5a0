"""How the changes of several models get on with each other."""

import json
import math
import re
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from torch import Tensor

from merge.interference import DENSITY, Interference, describe, interference, plot
from merge.kinship import Kinship
from tests.merge.models import NAMES, network, saved, tuned
from tests.merge.test_blocks import SD1_LABELS
from tuner.errors import ConfigError, DataError

BASE = network(1)
Model = Mapping[str, Tensor]


@pytest.fixture
def found(tmp_path):
    """`interference` of models a, b, c … with a base."""

    def interfering(base: Model, *models: Model) -> Interference:
        names = "abcdef"[: len(models)]
        stores = {name: saved(tmp_path / f"{name}.safetensors", one) for name, one in zip(names, models, strict=True)}
        return interference(saved(tmp_path / "base.safetensors", base), stores)

    return interfering


def towards(direction: Model, amount: float) -> dict[str, Tensor]:
    """BASE moved by `amount` times `direction` - BASE."""
    return {name: BASE[name] + amount * (direction[name] - BASE[name]) for name in NAMES}


def between(one: Model, other: Model, cosine: float) -> dict[str, Tensor]:
    """BASE changed so that the change of each tensor has this cosine with that of `one`, and its length."""
    found: dict[str, Tensor] = {}
    for name in NAMES:
        along, across = one[name] - BASE[name], other[name] - BASE[name]
        across = across - along * (across * along).sum() / (along * along).sum()
        across *= along.norm() / across.norm()
        found[name] = BASE[name] + cosine * along + math.sqrt(1 - cosine**2) * across
    return found


ONE = tuned(BASE, 2, 0.05, only="")
OTHER = between(ONE, tuned(BASE, 3, 0.05, only=""), 0.0)


@pytest.mark.parametrize("cosine", [-0.8, -0.3, 0.0, 0.3, 0.8])
def test_the_cosine_of_the_changes_is_found_in_all_and_block_by_block(found, cosine):
    met = found(BASE, ONE, between(ONE, OTHER, cosine))
    assert met.total(("a", "b")).cosine == pytest.approx(cosine, abs=1e-3)
    assert met.order == SD1_LABELS
    for block, one in met.meetings["a", "b"].items():
        assert one.cosine == pytest.approx(cosine, abs=1e-3), block
    # signs of two normal numbers with correlation c differ with probability acos(c) / pi
    assert met.total(("a", "b")).conflict == pytest.approx(math.acos(cosine) / math.pi, abs=0.02)


def test_independent_changes_meet_by_chance(found):
    total = found(BASE, ONE, OTHER).total(("a", "b"))
    assert total.overlap == pytest.approx(DENSITY, abs=0.02)
    assert total.clash == pytest.approx(0.5, abs=0.04)


def test_the_strongest_changes_are_the_largest_of_each_tensor(found):
    """Of ten numbers each changes by another amount: the two largest are the strongest fifth."""
    base = {"w": torch.zeros(2, 5)}
    change = torch.tensor([[1.0, 2, 3, 4, 5], [-6, -7, -8, -9, -10]])
    met = found(base, {"w": change}, {"w": change.flip(1)}).total(("a", "b"))
    assert (met.strongest_one, met.strongest_other, met.common) == (2, 2, 0)
    met = found(base, {"w": change}, {"w": -change}).total(("a", "b"))
    assert (met.overlap, met.clash, met.conflict) == (1, 1, 1)


def test_numbers_that_did_not_change_are_never_among_the_strongest(found):
    base = {"w": torch.zeros(100)}
    one, other = {"w": torch.zeros(100)}, {"w": torch.zeros(100)}
    one["w"][:3], other["w"][2:4] = 1.0, -1.0
    met = found(base, one, other).total(("a", "b"))
    assert (met.strongest_one, met.strongest_other, met.common, met.clashes, met.both) == (3, 2, 1, 1, 1)


def test_the_scale_leaves_each_change_there_once(found):
    """The sum of the changes, scaled, reaches as far along each of them as that one alone."""
    models = [ONE, between(ONE, OTHER, 0.5)]
    met = found(BASE, *models)
    change = [torch.cat([(model[name] - BASE[name]).flatten() for name in NAMES]) for model in models]
    total = met.scale * (change[0] + change[1])
    for one in change:
        assert (total @ one / (one @ one)).item() == pytest.approx(1, abs=1e-3)
    assert found(BASE, ONE, between(ONE, OTHER, -0.5)).scale == 1


# What is made of it


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([ONE, OTHER], "nothing to do with each other: their plain sum keeps each in full"),
        ([ONE, between(ONE, OTHER, 0.5)], r"share a direction \(mean cosine 0\.50\).*multiplied by 0\.67"),
        ([ONE, between(ONE, OTHER, -0.5)], r"a and b undo each other \(cosine -0\.50\)"),
        ([ONE, towards(ONE, 0.5)], "nearly one and the same"),
        ([ONE, BASE], "b is base itself"),
        ([ONE, network(2)], r"b does not come from base \(.*unet: unrelated"),
        ([ONE, OTHER, network(2)], r"c does not come from base \(.*unet: unrelated"),
    ],
)
def test_the_verdict_says_what_there_is_to_know(found, models, words):
    met = found(BASE, *models)
    assert any(re.search(words, sentence) for sentence in met.verdict), met.verdict
    assert "\n".join(met.verdict) in describe(met)


def test_models_of_another_base_are_told_by_the_way_that_they_share(found):
    met = found(network(2), ONE, OTHER)
    assert met.relations["a"].kinship is met.relations["b"].kinship is Kinship.UNRELATED
    assert any("rather made from another base" in sentence for sentence in met.verdict)


def test_a_block_in_which_models_undo_each_other_is_named(found):
    opposed = dict(OTHER)
    for name in NAMES:
        if ".up_blocks.1." in name:
            opposed[name] = BASE[name] - 0.5 * (ONE[name] - BASE[name]) + (OTHER[name] - BASE[name])
    met = found(BASE, ONE, opposed)
    assert any("undo each other in OUT0" in sentence for sentence in met.verdict), met.verdict


def test_strong_changes_of_different_signs_in_the_same_places_call_for_a_vote(found):
    """Both changed the same tenth of all numbers, each by signs of its own."""
    rng = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(tensor.shape, generator=rng) < 0.1 for name, tensor in BASE.items()}
    models = [
        {name: BASE[name] + 0.01 * masks[name] * torch.randn(BASE[name].shape, generator=rng).sign() for name in NAMES}
        for _ in range(2)
    ]
    met = found(BASE, *models)
    assert met.total(("a", "b")).overlap == pytest.approx(1, abs=0.05)
    assert any("let signs be elected (ties)" in sentence for sentence in met.verdict), met.verdict


def test_what_not_all_have_is_left_out_and_said(found):
    name = "unet.conv_in.weight"
    wider = ONE | {name: torch.zeros(9, 40)}
    met = found(BASE | {"extra.weight": torch.ones(2, 2)}, wider, OTHER)
    assert set(met.left_out) == {name, "extra.weight"}
    assert f"not compared, as not all have them in one shape: extra.weight, {name}" in describe(met)


def test_what_is_not_finite_is_left_out_and_said(found):
    odd = dict(ONE)
    odd["unet.conv_in.weight"] = ONE["unet.conv_in.weight"].clone()
    odd["unet.conv_in.weight"][0, :2] = torch.tensor([math.nan, math.inf])
    met = found(BASE, odd, OTHER)
    assert "a has 2 NaN or infinite numbers, left out" in describe(met)
    assert met.total(("a", "b")).cosine == pytest.approx(0, abs=0.01)


def test_the_report_is_json_without_nan(found):
    plain = json.loads(json.dumps(found(BASE, ONE, OTHER, BASE).plain(), allow_nan=False))
    assert [pair["models"] for pair in plain["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert plain["pairs"][1]["total"] == {
        "cosine": None,
        "opposed_signs": None,
        "strongest_in_common": None,
        "opposed_signs_of_those": None,
    }
    assert plain["models"]["a"]["kinship"] == "of one base"
    assert list(plain["models"]["a"]["blocks"]) == list(SD1_LABELS)


def test_a_picture_is_drawn(found, tmp_path):
    plot(found(BASE, ONE, OTHER, BASE), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"


def test_one_model_and_models_without_common_weights_are_refused(found):
    with pytest.raises(ConfigError, match="give two or more"):
        found(BASE, ONE)
    with pytest.raises(DataError, match="base, a, b: no weights that all of them have"):
        found({"w": torch.ones(1)}, ONE, OTHER)
