import pytest
import torch
from torch.nn import functional

from tuner.errors import DataError
from tuner.weights.lora import LoraWeights


def test_delta_is_what_the_two_layers_do_one_after_the_other() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(3, 5, dtype=torch.float32), torch.randn(7, 3)
    lora = LoraWeights({"m.lora_A.weight": down, "m.lora_B.weight": up}, {"m": 6.0})
    x = torch.randn(4, 5)
    expected = 6 / 3 * functional.linear(functional.linear(x, down), up)
    assert torch.allclose(functional.linear(x, lora.delta("m")), expected, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_delta_of_a_convolution_is_a_convolution(kernel: int) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(2, 5, kernel, kernel), torch.randn(7, 2, 1, 1)
    lora = LoraWeights({"m.lora_A.weight": down, "m.lora_B.weight": up}, {"m": 1.0})
    x = torch.randn(1, 5, 6, 6)
    expected = 1 / 2 * functional.conv2d(functional.conv2d(x, down, padding=kernel // 2), up)
    assert lora.delta("m").shape == (7, 5, kernel, kernel)
    assert torch.allclose(functional.conv2d(x, lora.delta("m"), padding=kernel // 2), expected, atol=1e-5)


def test_balancing_changes_no_bit_of_the_deltas_and_saves_small_values() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(4, 8), torch.randn(8, 4) * 1e-6
    lora = LoraWeights({"m.lora_A.weight": down, "m.lora_B.weight": up}, {"m": 1.0})
    assert torch.equal(lora.balanced().delta("m"), lora.delta("m"))

    def error(stored: LoraWeights) -> float:
        return ((stored.delta("m") - lora.delta("m")).norm() / lora.delta("m").norm()).item()

    assert error(lora.to(torch.float16)) > 1e-2
    assert error(lora.balanced().to(torch.float16)) < 1e-3


def test_an_untrained_lora_stays_as_it_is() -> None:
    lora = LoraWeights({"m.lora_A.weight": torch.randn(4, 8), "m.lora_B.weight": torch.zeros(8, 4)}, {"m": 1.0})
    assert torch.equal(lora.balanced().delta("m"), torch.zeros(8, 8))


@pytest.mark.parametrize(
    ("tensors", "alphas"),
    [
        ({"m.lora_A.weight": torch.ones(2, 3)}, {"m": 1.0}),
        ({"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(3, 2)}, {}),
        ({"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(3, 2)}, {"m": 1.0, "n": 1.0}),
        ({"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(2, 3)}, {"m": 1.0}),
        ({"m.lora_A.weight": torch.ones(2, 3, 3, 3), "m.lora_B.weight": torch.ones(3, 2)}, {"m": 1.0}),
    ],
)
def test_what_is_no_lora_is_refused(tensors: dict[str, torch.Tensor], alphas: dict[str, float]) -> None:
    with pytest.raises(DataError):
        LoraWeights(tensors, alphas)
