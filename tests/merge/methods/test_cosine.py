import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from merge.methods.cosine import Cosine
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import relative, tensors


def similarity(a, b, overall):
    """supermerger's, written down plainly: columns are what is compared along the first dimension."""
    columns = cosine_similarity(a, b, dim=0, eps=0)
    if overall == "none":
        return columns
    x, y = (normalize(a, dim=0), normalize(b, dim=0)) if overall == "columns" else (a, b)
    return (columns + (x * y).sum() / (x.norm() * y.norm())) / 2


def pair(*shape):
    a, noise = tensors(*shape, count=2)
    return a, a + 0.7 * noise


@pytest.mark.parametrize("overall", ["columns", "tensor", "none"])
@pytest.mark.parametrize("shape", [(9,), (20, 7), (20, 5, 3, 3), (20, 7, 1, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.8])
def test_columns_that_are_alike_stay_a_and_others_become_b(overall, shape, alpha):
    a, b = pair(*shape)
    k = (similarity(a, b, overall) - alpha).clamp(0, 1)
    result = apply(Cosine(alpha=alpha, overall=overall), a, b, dtype=torch.float64)
    assert relative(result, k * a + (1 - k) * b) < 1e-13


def test_with_the_models_extremes_it_is_supermergers():
    models = [pair(20, 7) for _ in range(3)]
    every = torch.cat([similarity(a, b, "columns") for a, b in models])
    low, high = every.min(), every.max()
    for a, b in models:
        k = ((similarity(a, b, "columns") - low) / (high - low) - 0.2).clamp(0, 1)
        result = apply(Cosine(alpha=0.2, low=low.item(), high=high.item()), a, b, dtype=torch.float64)
        assert relative(result, k * a + (1 - k) * b) < 1e-12


@pytest.mark.parametrize("overall", ["columns", "tensor", "none"])
def test_a_column_that_is_zero_in_one_is_not_alike(overall):
    a, b = pair(20, 7)
    a[:, 2] = 0
    result = apply(Cosine(overall=overall), a, b, dtype=torch.float64)
    cosine = 0.0
    if overall != "none":
        cosine = (similarity(a, b, overall)[0] - cosine_similarity(a, b, dim=0)[0] / 2).item()
    assert relative(result[:, 2], (1 - cosine) * b[:, 2]) < 1e-13
    assert result.isfinite().all()
    assert not apply(Cosine(overall=overall), torch.zeros(3, 4), torch.zeros(3, 4)).any()


@pytest.mark.parametrize("overall", ["columns", "tensor", "none"])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(overall, shape):
    a = tensors(*shape, count=1, dtype=torch.float32)[0]
    assert same_bits(apply(Cosine(alpha=0.3, overall=overall), a, a.clone()), a)


def test_an_alpha_of_one_is_b():
    a, b = pair(20, 7)
    assert Cosine(alpha=1.0).unchanged() == 1
    assert relative(apply(Cosine(alpha=1.0), a, b, dtype=torch.float64), b) < 1e-15
    assert Cosine(alpha=1.0, high=0.9).unchanged() is None
    assert Cosine(alpha=0.9).unchanged() is None


def test_runs_do_not_matter():
    a, b = (tensor.float() for tensor in pair(7, 100))
    assert same_bits(apply(Cosine(), a, b), apply(Cosine(), a, b, runs=[1, 150, 0, 249, 300]))


def test_what_counts_as_nothing_is_less_than_what_counts_as_all():
    with pytest.raises(ValueError, match=r"low: must be below high \(0.5\), got 0.5"):
        Cosine(low=0.5, high=0.5)
    with pytest.raises(ValueError, match="alpha"):
        Cosine(alpha=2.0)


@pytest.mark.parametrize(("overall", "name"), [("none", "add_cosine_a"), ("tensor", "add_cosine_b")])
def test_sd_mecha_agrees(overall, name):
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.cosine")
    a, b = pair(20, 7)
    peer = getattr(module, name).__wrapped__(a, b, torch.tensor(0.25, dtype=torch.float64))
    assert relative(apply(Cosine(alpha=0.25, overall=overall), a, b, dtype=torch.float64), peer) < 1e-12
