import pytest
import torch

from merge.coefficients import Varying
from merge.methods.lerp import Lerp
from merge.methods.weighted_sum import WeightedSum
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random
from tuner.errors import ConfigError


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (1.0, -0.5, 2.0), (0.0, 1.0, 1.0)])
def test_weights_are_divided_by_their_sum_unless_one_says_not(weights):
    tensors = random(6, 50, dtype=torch.float64)
    total = sum(w * tensor for w, tensor in zip(weights, tensors, strict=True))
    close(apply(WeightedSum(weights=weights), *tensors, dtype=torch.float64), total / sum(weights))
    close(apply(WeightedSum(weights=weights, normalize=False), *tensors, dtype=torch.float64), total)


@pytest.mark.parametrize("inputs", [1, 2, 5])
def test_without_weights_it_is_the_mean_or_the_sum(inputs):
    tensors = random(6, 50, inputs=inputs, dtype=torch.float64)
    close(apply(WeightedSum(), *tensors, dtype=torch.float64), torch.stack(tensors).mean(0))
    close(apply(WeightedSum(normalize=False), *tensors, dtype=torch.float64), torch.stack(tensors).sum(0))


def test_of_two_it_is_lerp():
    a, b = random(6, 50, inputs=2, dtype=torch.float64)
    close(
        apply(WeightedSum(weights=(3.0, 1.0)), a, b, dtype=torch.float64),
        apply(Lerp(t=0.25), a, b, dtype=torch.float64),
    )


def test_an_input_of_weight_zero_is_not_looked_at():
    a, b, _ = random(6, 50)
    spoilt = torch.full_like(a, torch.nan)
    assert same_bits(
        apply(WeightedSum(weights=(0.3, 0.0, 0.7)), a, spoilt, b),
        apply(WeightedSum(weights=(0.3, 0.7)), a, b),
    )


def test_a_thousand_checkpoints_are_averaged_without_loss():
    model = random(6, 50, inputs=1)[0].half()
    assert torch.equal(apply(WeightedSum(), *[model] * 1000).half(), model)


@pytest.mark.parametrize("weights", [(0.0,), (0.0, 0.0), (1.0, -1.0), (0.1, 0.2, -0.3)])
def test_a_sum_of_zero_is_refused_where_it_is_divided_by(weights):
    with pytest.raises(ValueError, match=r"^weights must not add up to 0"):
        WeightedSum(weights=weights)
    assert WeightedSum(weights=weights, normalize=False)
    assert WeightedSum(weights=(Varying(default=1), -1))  # may be otherwise for some tensor


def test_there_is_a_weight_for_each_input_or_none():
    with pytest.raises(ConfigError, match="weights: 2 of them for 3 inputs; give one for each, or none"):
        apply(WeightedSum(weights=(1.0, 2.0)), *random(5))


@pytest.mark.parametrize("normalize", [True, False])
def test_mergekit_agrees(normalize):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    tensors = random(6, 50)
    parameters = {"weight": [3.0, -1.0, 0.5], "normalize": normalize}
    peer = mergekit.merge_tensors(tensors, "linear", parameters=parameters)
    result = apply(WeightedSum(weights=(3.0, -1.0, 0.5), normalize=normalize), *tensors)
    torch.testing.assert_close(result, peer, rtol=1e-6, atol=1e-9)


def test_sd_mecha_agrees_on_the_mean():
    linear = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    tensors = random(6, 50)
    peer = linear.n_average.__wrapped__(*({"w": tensor} for tensor in tensors), key="w")
    torch.testing.assert_close(apply(WeightedSum(), *tensors), peer, rtol=1e-6, atol=1e-9)
