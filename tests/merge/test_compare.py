"""Two checkpoints compared."""

import json
import math
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from torch import Tensor

from merge import compare as module
from merge.compare import OTHER, Sums, compare, describe, plot
from merge.methods.base import GRID
from tests.merge.models import NAMES, network, saved, tuned
from tests.merge.test_blocks import SD1_LABELS
from tuner.errors import DataError


@pytest.fixture
def comparison(tmp_path):
    """Compares two sets of tensors."""

    def compared(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> module.Comparison:
        return compare(saved(tmp_path / "a.safetensors", a), saved(tmp_path / "b.safetensors", b), ("A", "B"))

    return compared


def only(a: Tensor, b: Tensor) -> Sums:
    return Sums.of(a.double().reshape(-1).clone(), b.double().reshape(-1).clone())


# The measures


def test_the_measures_are_those_of_their_definitions():
    a, b = torch.randn(1000).double(), torch.randn(1000).double()
    b[:300] = a[:300]
    sums = only(a, b)
    assert sums.numbers == 1000
    assert sums.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-12)
    assert sums.relative == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-12)
    assert sums.share_changed == 0.7
    assert sums.share_opposed == (a * b < 0).double().mean()
    assert sums.largest == (b - a).abs().max()


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 0.1, 1.0, 2.0, math.pi])
def test_the_cosine_is_exact_near_1_too(angle):
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = 3 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    cosine = only(a, b).cosine
    assert cosine is not None
    assert 1 - cosine == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-5, abs=1e-15)


def test_sums_of_parts_are_the_sums_of_the_whole():
    a, b = torch.randn(1000), torch.randn(1000)
    parts = sum((only(a[start : start + 77], b[start : start + 77]) for start in range(0, 1000, 77)), Sums())
    whole = only(a, b)
    for name, number in whole.plain().items():
        assert parts.plain()[name] == pytest.approx(number, rel=1e-12), name


def test_zeros_have_no_cosine_and_no_relative_difference():
    zero, one = torch.zeros(4), torch.ones(4)
    assert (only(zero, zero).cosine, only(zero, zero).relative) == (None, 0.0)
    assert (only(zero, one).cosine, only(zero, one).relative) == (None, None)
    assert (only(one, zero).cosine, only(one, zero).relative) == (None, 1.0)


def test_what_is_not_finite_is_counted_and_left_out():
    a = torch.tensor([1.0, math.nan, math.inf, 2.0, math.nan, math.inf])
    b = torch.tensor([1.0, 1.0, math.inf, -2.0, math.nan, -math.inf])
    sums = only(a, b)
    assert (sums.non_finite_a, sums.non_finite_b) == (4, 3)
    assert (sums.products, sums.squares_d, sums.largest) == (-3, 16, 4)
    assert sums.changed == 3  # NaN became 1, 2 became -2, inf became -inf


# Checkpoints


def test_a_change_is_found_where_it_was_made(comparison):
    base = network(1)
    changed = dict(base)
    name = "unet.down_blocks.1.resnets.0.conv1.weight"
    changed[name] = 1.1 * base[name]
    found = comparison(base, changed)
    assert [block for block, sums in found.groups.items() if sums.changed] == ["IN04"]
    assert found.groups["IN04"].relative == pytest.approx(0.1, rel=1e-5)
    assert found.groups["IN04"].cosine == pytest.approx(1)
    assert [name for name, sums in found.tensors.items() if sums.changed] == [name]
    assert found.total.changed == found.tensors[name].numbers
    assert "10.00 %" in describe(found)
    assert f"10.00 %  {name}" in describe(found)


def test_every_block_is_shown_in_its_order(comparison):
    base = network(1)
    found = comparison(base, tuned(base, 2, 0.05))
    assert found.order == SD1_LABELS
    lines = describe(found).split("\n")
    assert [line.split()[0] for line in lines[2 : 2 + len(SD1_LABELS)]] == list(SD1_LABELS)
    assert lines[2 + len(SD1_LABELS)].startswith("all")
    assert found.total.relative == pytest.approx(0.05, abs=0.01)
    assert set(found.tensors) == set(NAMES)


def test_a_checkpoint_is_identical_to_itself_in_another_dtype_that_holds_its_numbers(comparison):
    half = {name: tensor.half() for name, tensor in network(1).items()}
    found = comparison(half, {name: tensor.float() for name, tensor in half.items()})
    assert found.identical
    assert "identical" in describe(found)
    assert f"{len(NAMES)} tensors are F16 in A and F32 in B" in describe(found)


def test_what_cannot_be_compared_is_said(comparison):
    a = {
        "w": torch.ones(2, 4),
        "x": torch.ones(3),
        "ids": torch.arange(5),
        "same": torch.arange(2),
        "old": torch.ones(1),
    }
    b = {"w": torch.ones(2, 9), "x": torch.ones(3), "ids": torch.arange(5) + 1, "same": torch.arange(2)}
    b |= {"new": torch.tensor(math.nan), "newer": torch.tensor(math.nan)}
    found = comparison(a, b)
    assert set(found.tensors) == {"x"}
    assert found.group == {"x": OTHER}
    assert not found.identical
    text = describe(found)
    assert "only in A: old" in text
    assert "only in B: new, newer" in text
    assert "not compared: w is [2, 4] in A and [2, 9] in B" in text
    assert "whole numbers that differ: ids" in text
    assert "same" not in text


def test_nan_and_infinity_are_said_of_the_model_that_has_them(comparison):
    odd = torch.ones(3)
    odd[1] = math.nan
    text = describe(comparison({"w": torch.ones(3), "x": torch.ones(1)}, {"w": odd, "x": torch.ones(1)}))
    assert "B has 1 NaN or infinite numbers, left out of the sums: w" in text
    assert "A has" not in text


def test_checkpoints_without_a_common_tensor_are_refused(comparison):
    with pytest.raises(DataError, match=r"A and B have no tensor in common: 'unet\.a' in one, 'model\.b' in the other"):
        comparison({"unet.a": torch.ones(1)}, {"model.b": torch.ones(1)})


def test_small_changes_do_not_look_like_none(comparison):
    a = torch.ones(100_000)
    b = a.clone()
    b[0] = 1 + 1e-5
    lines = describe(comparison({"w": a}, {"w": b})).split("\n")
    assert lines[2].split()[4:6] == ["<0.01", "%"]


def test_numbers_are_summed_over_all_runs_of_a_tensor(comparison):
    a = {"w": torch.ones(2 * GRID + 5)}
    b = {"w": torch.ones(2 * GRID + 5)}
    b["w"][-1] = -3
    sums = comparison(a, b).total
    assert (sums.numbers, sums.changed, sums.opposed, sums.largest) == (2 * GRID + 5, 1, 1, 4)


def test_the_report_is_json_with_every_tensor_and_without_nan(comparison):
    a = {"zero": torch.zeros(3), "w": torch.ones(3)}
    plain = json.loads(json.dumps(comparison(a, {"zero": torch.ones(3), "w": torch.ones(3)}).plain(), allow_nan=False))
    assert plain["tensors"]["zero"]["relative_difference"] is None
    assert plain["tensors"]["w"] == {
        "block": OTHER,
        "numbers": 3,
        "relative_difference": 0.0,
        "cosine": 1.0,
        "changed": 0.0,
        "opposed_signs": 0.0,
        "largest_difference": 0.0,
        "non_finite_a": 0,
        "non_finite_b": 0,
    }
    assert plain["total"]["numbers"] == 6


@pytest.mark.parametrize("change", [0.0, 0.05])
def test_a_picture_is_drawn_also_of_no_difference(comparison, tmp_path, change):
    base = network(1)
    changed = tuned(base, 2, change) if change else base
    changed["unet.conv_out.bias"] = changed["unet.conv_out.bias"] + 100 * change  # far above the scale
    plot(comparison(base, changed), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
