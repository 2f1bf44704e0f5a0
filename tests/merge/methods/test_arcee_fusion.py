import pytest
import torch
from torch import Tensor

from merge.methods.arcee_fusion import ArceeFusion
from tests.merge import memory
from tests.merge.memory import apply
from tests.merge.methods.tensors import CASES, random


def importance(a: Tensor, b: Tensor) -> Tensor:
    """The formula, in float64."""
    a, b = a.double(), b.double()
    rows = (a.shape[0], -1) if a.ndim > 1 and a[0].numel() > 1 else (1, -1)
    p, q = b.reshape(rows).softmax(1), a.reshape(rows).softmax(1)
    divergence = (p * (p / q).log()).sum(1, keepdim=True).clamp(min=0)
    return ((b - a).abs().reshape(rows) * divergence).reshape(a.shape)


def reference(a: Tensor, b: Tensor, fence: float) -> Tensor:
    found = importance(a, b)
    if found.numel() == 0:
        return a
    first, second, third = (found.quantile(q) for q in (0.25, 0.5, 0.75))
    return torch.where(found > second + fence * (third - first), b, a)


def models(name: str) -> tuple[Tensor, Tensor]:
    """Two models that differ by a fifth of what they are."""
    a = CASES[name][0] * 50
    return a, a + CASES[name][1] * 10


@pytest.mark.parametrize("fence", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"constant", "opposite inputs", "equal inputs", "tiny and huge"}))
def test_it_takes_over_what_matters_more_than_the_rest(name, fence, monkeypatch):
    monkeypatch.setattr(memory, "GRID", 50)
    a, b = models(name)
    found = apply(ArceeFusion(fence=fence), a, b, dtype=torch.float64)
    assert torch.equal(found, reference(a, b, fence).double())


@pytest.mark.parametrize("name", ["matrix", "convolution", "1x1 convolution", "depthwise", "rows of one", "vector"])
def test_some_of_it_is_taken_over_and_not_all(name):
    """mergekit takes 1x1 convolutions wholly: its softmax runs over a dimension of 1."""
    a, b = (tensor * 50 for tensor in CASES[name][:2])
    taken = (apply(ArceeFusion(fence=0.5), a, b) == b).double().mean()
    assert 0 < taken < 0.5


def test_one_number_stays():
    for shape in ((), (1,), (1, 1, 1, 1)):
        a, b = random(*shape, inputs=2)
        assert torch.equal(apply(ArceeFusion(), a, b), a)


def test_nothing_is_taken_over_where_nothing_stands_out():
    a = random(20, 30, inputs=1)[0]
    assert torch.equal(apply(ArceeFusion(), a, a), a)
    ones, mixed = torch.zeros(4, 6), torch.tensor([1.0, -1, 1, -1, 1, -1]).repeat(4, 1)
    assert torch.equal(apply(ArceeFusion(), ones, mixed), ones)


def test_rows_that_are_only_shifted_do_not_count():
    a = random(20, 30, inputs=1)[0].double()
    b = a.clone()
    b[:10] += 0.5
    b[10:] += random(10, 30, inputs=1, seed=5)[0]
    found = apply(ArceeFusion(fence=0.0), a, b, dtype=torch.float64)
    assert torch.equal(found[:10], a[:10])
    assert (found[10:] == b[10:]).double().mean() > 0.5


def test_differences_of_a_fine_tune_are_told_apart():
    """A row's divergence is then about 1e-10: the sum, nearly zero, of differences of about 1e-5."""
    a = random(40, 50, inputs=1)[0] * 50
    b = a + random(40, 50, inputs=1, seed=3)[0] * 0.01
    taken = apply(ArceeFusion(), a, b) == b
    assert taken.sum() > 50
    assert torch.equal(taken, reference(a, b, 1.5) == b)


def test_mergekit_nearly_agrees_on_matrices_and_takes_over_all_of_a_1x1_convolution():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = (tensor * 50 for tensor in random(200, 300, inputs=2, dtype=torch.float64))
    peer = mergekit.merge_tensors([a, b], "arcee_fusion", base_index=0)
    found = apply(ArceeFusion(), a, b, dtype=torch.float64)
    assert 0.01 < (found == b).double().mean() < 0.2
    assert ((found == b) == ((peer - b).abs() < 1e-12)).double().mean() > 0.9999  # its quartiles are not interpolated
    c, d = (tensor.reshape(200, 300, 1, 1) for tensor in (a, b))
    torch.testing.assert_close(mergekit.merge_tensors([c, d], "arcee_fusion", base_index=0), d)
    assert torch.equal(apply(ArceeFusion(), c, d, dtype=torch.float64).reshape(200, 300), found)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="fence must be 0 or more"):
        ArceeFusion(fence=-1.0)
