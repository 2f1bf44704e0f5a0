import pytest
import torch

from merge.methods.ram import Ram
from tests.merge.memory import apply
from tests.merge.methods.tensors import random


def sparse(*shape, inputs=3):
    """Differences of which most numbers are zero or noise."""
    return [
        torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(index)) < 0.3, tensor, tensor * 1e-3)
        for index, tensor in enumerate(random(*shape, inputs=inputs, dtype=torch.float64))
    ]


def formula(deltas, thresholds, r=0.0, alpha=0.0):
    stacked = torch.stack(deltas)
    changed = torch.stack([delta.abs() > threshold for delta, threshold in zip(deltas, thresholds, strict=True)])
    count = changed.sum(0)
    result = torch.where(count > 1, (stacked * changed).sum(0) / count.clamp(min=1), 0)
    for delta, mask in zip(deltas, changed, strict=True):
        shared, alone = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
        result += torch.where(mask & (count == 1), delta, 0) * (1 + r * min(shared / max(alone, 1e-9), alpha))
    return result


@pytest.mark.parametrize("r", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 100.0])
@pytest.mark.parametrize("shape", [(20, 50), (300_000,)])
def test_it_is_the_papers_formula(r, alpha, shape):
    deltas = sparse(*shape)
    result = apply(Ram(unit="absolute", threshold=1e-5, r=r, alpha=alpha), *deltas, dtype=torch.float64)
    torch.testing.assert_close(result, formula(deltas, [1e-5] * 3, r, alpha), rtol=1e-12, atol=1e-17)


def test_by_default_the_threshold_is_a_tenth_of_each_differences_root_mean_square():
    deltas = [delta * factor for delta, factor in zip(sparse(20, 50), (1, 10, 1e-6), strict=True)]
    thresholds = [0.1 * delta.square().mean().sqrt().item() for delta in deltas]
    result = apply(Ram(), *deltas, dtype=torch.float64)
    torch.testing.assert_close(result, formula(deltas, thresholds), rtol=1e-12, atol=0)


def test_what_one_model_has_learned_alone_is_kept_whole():
    a, b = torch.zeros(4), torch.zeros(4)
    a[:2], b[1:3] = 1.0, 3.0
    assert apply(Ram(), a, b).tolist() == [1, 2, 3, 0]


def test_the_scale_of_the_differences_does_not_matter_unless_the_threshold_is_absolute():
    deltas = [delta.half().float() for delta in sparse(20, 50)]
    small = [delta * 2**-10 for delta in deltas]
    assert torch.equal(apply(Ram(), *small), apply(Ram(), *deltas) * 2**-10)
    absolute = Ram(unit="absolute", threshold=1e-5)
    assert not torch.equal(apply(absolute, *small), apply(absolute, *deltas) * 2**-10)


@pytest.mark.parametrize("field", ["threshold", "r", "alpha"])
def test_its_numbers_are_0_or_more(field):
    with pytest.raises(ValueError, match=f"^{field} must be 0 or more, got -1"):
        Ram(**{field: -1})


def test_mergekit_agrees():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    base, *deltas = [torch.zeros(20, 50, dtype=torch.float64), *sparse(20, 50)]
    models = [base + delta for delta in deltas]
    peer = mergekit.merge_tensors([base, *models], "ram", parameters={"epsilon": 1e-5}, base_index=0)
    ram = apply(Ram(unit="absolute", threshold=1e-5), *deltas, dtype=torch.float64)
    torch.testing.assert_close(ram, peer, rtol=1e-12, atol=1e-17)
    parameters = {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
    peer = mergekit.merge_tensors([base, *models], "ramplus_tl", parameters=parameters, base_index=0)
    plus = apply(Ram(unit="absolute", threshold=1e-5, r=0.1), *deltas, dtype=torch.float64)
    torch.testing.assert_close(plus, peer, rtol=1e-7, atol=1e-17)
