import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from merge.methods.sce import Sce
from tests.merge import memory
from tests.merge.memory import apply
from tests.merge.methods.tensors import CASES, random, rounded


def reference(tensors: Sequence[Tensor], select: float, of: str = "all") -> Tensor:
    """The formula, in float64."""
    deltas = torch.stack([tensor.double().reshape(-1) for tensor in tensors])
    if select < 1:
        variance = (deltas - deltas.mean(0)).square().mean(0)
        variance[(deltas == deltas[0]).all(0)] = 0
        count = int(select * (variance.numel() if of == "all" else int(variance.count_nonzero())))
        mask = torch.zeros_like(variance, dtype=torch.bool)
        mask[variance.argsort(descending=True, stable=True)[:count]] = True
        deltas = deltas * (mask & (variance > 0))
    weights = deltas.square().sum(1, keepdim=True)
    weights = weights / (weights.sum() or 1)
    sign = deltas.sum(0).sign()
    inside = (deltas.sign() == sign) & (sign != 0)
    divisor = (weights * inside).sum(0)
    return ((weights * deltas * inside).sum(0) / torch.where(divisor > 0, divisor, 1)).reshape(tensors[0].shape)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"from float16", "from bfloat16", "tiny and huge"}))
def test_it_selects_calculates_and_erases(name, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    for select, of in itertools.product((0.0, 0.25, 0.5, 1.0), ("all", "varying")):
        found = apply(Sce(select=select, of=of, scale=0.5), *CASES[name], dtype=torch.float64)
        torch.testing.assert_close(found, 0.5 * reference(CASES[name], select, of), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_equal_variances_exactly_the_part_is_selected(dtype):
    """Of equal variances it does not matter which are selected, but how many; they are whole multiples of a step."""
    tensors = rounded(60, 50, inputs=2, dtype=dtype)
    varying = int((tensors[0] != tensors[1]).sum())
    assert varying < 3000
    moved = [tensor + 1 for tensor in tensors]  # no zeros: what is selected shows
    assert (apply(Sce(select=0.1), *moved) != 0).sum() == 300
    assert (apply(Sce(select=0.5, of="varying"), *moved) != 0).sum() == varying // 2


def test_the_stronger_input_weighs_more_however_small_both_are():
    """mergekit falls back on equal weights where the mean squares add up to less than 1e-6: for most fine-tunes."""
    one, two = random(100, 100, inputs=2)
    one, two = one.abs() * 1e-3, two.abs() * 3e-3
    first, second = one.square().sum(), two.square().sum()
    found = apply(Sce(select=1), one, two)
    torch.testing.assert_close(found, (first * one + second * two) / (first + second), rtol=1e-5, atol=0)
    assert (second / first).item() == pytest.approx(9, rel=0.1)


def test_squares_that_float32_cannot_hold_are_weights_still():
    tensors = random(6, 7)
    found = apply(Sce(select=1), *[tensor * 1e-22 for tensor in tensors])
    torch.testing.assert_close(found * 1e22, apply(Sce(select=1), *tensors), rtol=1e-5, atol=0)


def test_what_all_inputs_agree_about_is_left_out_unless_all_is_selected():
    delta = random(8, 9, inputs=1)[0]
    assert not apply(Sce(select=0.5), delta, delta, delta).any()
    torch.testing.assert_close(apply(Sce(select=1), delta, delta, delta), delta)


def test_mergekit_agrees_but_on_small_differences():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = zip(random(20, 30, dtype=torch.float64), (30, 60, 90), strict=True)
    tensors = [tensor * factor for tensor, factor in given]

    def peer(tensors: Sequence[Tensor], select: float) -> Tensor:
        base = torch.zeros_like(tensors[0])
        return mergekit.merge_tensors([base, *tensors], "sce", parameters={"select_topk": select}, base_index=0)

    for select in (0.1, 0.5, 1.0):
        found = apply(Sce(select=select, of="varying"), *tensors, dtype=torch.float64)
        torch.testing.assert_close(found, peer(tensors, select), rtol=1e-9, atol=0)
    small = [tensor * 1e-3 for tensor in tensors]
    found = apply(Sce(select=1), *small, dtype=torch.float64)
    torch.testing.assert_close(found, peer(tensors, 1.0) * 1e-3, rtol=1e-9, atol=0)
    stacked = torch.stack(small)
    inside = stacked.sign() == stacked.sum(0).sign()
    torch.testing.assert_close(peer(small, 1.0), (stacked * inside).sum(0) / inside.sum(0), rtol=1e-9, atol=0)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="select must be from 0 to 1"):
        Sce(select=10.0)
