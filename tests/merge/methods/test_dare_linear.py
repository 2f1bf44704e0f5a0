import pytest
import torch

from merge.methods.dare_linear import DareLinear
from tests.merge import memory
from tests.merge.memory import apply, same_bits
from tests.merge.methods.sparse import added_up
from tests.merge.methods.tensors import CASES, random


def masks(density: float = 0.5, name: str = "weight", seed: int = 0, inputs: int = 2, elements: int = 1 << 14):
    """What is kept of each input."""
    ones = torch.ones(elements)
    weights = [tuple(float(i == j) for i in range(inputs)) for j in range(inputs)]
    methods = [DareLinear(density=density, seed=seed, rescale="none", weights=weight) for weight in weights]
    return [apply(method, *[ones] * inputs, name=name) != 0 for method in methods]


@pytest.mark.parametrize("rescale", ["inverse", "none"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_weighted_sum_of_what_the_masks_leave(name, rescale, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    tensors, weights = CASES[name], (1.0, -0.5, 2.0)
    kept = masks(0.25, inputs=3, elements=tensors[0].numel(), seed=4)
    factor = 4 if rescale == "inverse" else 1
    left = [tensor * mask.reshape(tensor.shape) * factor for tensor, mask in zip(tensors, kept, strict=True)]
    method = DareLinear(density=0.25, weights=weights, seed=4, scale=0.5, rescale=rescale)
    torch.testing.assert_close(
        apply(method, *tensors, dtype=torch.float64), 0.5 * added_up(left, weights), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_each_mask_keeps_its_part(density):
    for mask in masks(density, elements=1 << 16):
        deviation = (density * (1 - density) / 2**16) ** 0.5
        assert abs(mask.double().mean() - density) < 5 * deviation


def test_masks_of_inputs_names_and_seeds_are_independent():
    found = [mask for name in ("a", "b", "c") for seed in (0, 1) for mask in masks(name=name, seed=seed)]
    correlations = torch.corrcoef(torch.stack(found).double()).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 128


def test_masks_can_be_made_again():
    assert all(torch.equal(one, two) for one, two in zip(masks(seed=3), masks(seed=3), strict=True))
    tensors = random(300, 40)
    assert same_bits(apply(DareLinear(seed=3), *tensors), apply(DareLinear(seed=3), *tensors))


def test_the_arithmetic_does_not_change_what_is_kept():
    tensors = random(50, 40)
    half, double = (apply(DareLinear(density=0.3), *tensors, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(half != 0, double != 0)
    torch.testing.assert_close(half.double(), double, rtol=1e-5, atol=1e-9)


def test_with_everything_kept_it_is_the_sum():
    tensors = random(5, 6)
    assert torch.equal(apply(DareLinear(density=1), *tensors), tensors[0] + tensors[1] + tensors[2])


def test_rescaled_by_the_norm_each_input_has_the_sum_of_absolute_values_that_it_had():
    """As in mergekit, whose factor differs from the paper's by what the mask happens to keep."""
    tensor = random(60, 50, inputs=1)[0]
    found = apply(DareLinear(density=0.2, rescale="norm"), tensor)
    torch.testing.assert_close(found.double().abs().sum(), tensor.double().abs().sum(), rtol=1e-6, atol=0)
    factors = (found / tensor)[found != 0]
    assert factors.max() - factors.min() < 1e-5 and factors.mean() == pytest.approx(5, rel=0.2)
    assert factors.mean() != pytest.approx(5, rel=1e-3)


def test_peft_rescales_as_the_paper_and_mergekit_by_the_norm():
    tensor = random(60, 50, inputs=1)[0]
    peft = pytest.importorskip("peft.utils.merge_utils")
    peer = peft.dare_linear([tensor], torch.tensor([1.0]), 0.25)
    found = apply(DareLinear(density=0.25), tensor)
    both = (peer != 0) & (found != 0)
    assert torch.equal(peer[both], found[both])
    mergekit = pytest.importorskip("mergekit.sparsify")
    peer = mergekit.bernoulli(tensor, 0.25, mergekit.RescaleNorm.l1)
    torch.testing.assert_close(peer.abs().sum(), tensor.abs().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        apply(DareLinear(density=0.25, rescale="norm"), tensor).abs().sum(), peer.abs().sum(), rtol=1e-5, atol=0
    )


def test_sd_mechas_masks_are_the_same_for_every_tensor_and_input_after_the_seed():
    mecha = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
    ones = torch.ones(1000)
    one, two = (
        mecha.find_della_dropout(ones, torch.tensor(0.5), 0.0, torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(one, two), "a generator of its own for each tensor, with one seed"
    found = [apply(DareLinear(density=0.5), ones, name=name) for name in ("a", "b")]
    assert not torch.equal(*found)
