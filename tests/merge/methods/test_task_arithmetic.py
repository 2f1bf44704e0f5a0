import pytest
import torch

from merge.methods.task_arithmetic import TaskArithmetic
from tests.merge.memory import apply
from tests.merge.methods.tensors import random


@pytest.mark.parametrize("weights", [(), (3.0, 1.0, -0.5)])
@pytest.mark.parametrize("scale", [1.0, 0.4, -1.0, 0.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_papers_formula(weights, scale, normalize):
    tensors = random(6, 50, dtype=torch.float64)
    counted = weights or (1.0, 1.0, 1.0)
    expected = scale * sum(w * tensor for w, tensor in zip(counted, tensors, strict=True))
    if normalize:
        expected = expected / sum(counted)
    method = TaskArithmetic(weights=weights, scale=scale, normalize=normalize)
    torch.testing.assert_close(apply(method, *tensors, dtype=torch.float64), expected, rtol=1e-12, atol=1e-17)


def test_a_sum_of_zero_is_refused_where_it_is_divided_by():
    assert TaskArithmetic(weights=(1.0, -1.0))
    with pytest.raises(ValueError, match=r"^weights must not add up to 0"):
        TaskArithmetic(weights=(1.0, -1.0), normalize=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_mergekit_agrees(normalize):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    base, *deltas = random(6, 50, inputs=4)
    parameters = {"weight": [3.0, 1.0, 0.5], "lambda": 0.6, "normalize": normalize}
    models = [base, *(base + delta for delta in deltas)]
    peer = mergekit.merge_tensors(models, "task_arithmetic", parameters=parameters, base_index=0)
    method = TaskArithmetic(weights=(3.0, 1.0, 0.5), scale=0.6, normalize=normalize)
    torch.testing.assert_close(base + apply(method, *deltas), peer, rtol=1e-5, atol=1e-9)
