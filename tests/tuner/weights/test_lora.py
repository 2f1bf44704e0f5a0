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


@pytest.mark.parametrize("ending", [(), (3, 3)])
def test_distance_is_that_of_the_deltas_which_it_does_not_form(ending: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ones = (1,) * len(ending)
    one = LoraWeights(
        {"m.lora_A.weight": torch.randn(3, 5, *ending), "m.lora_B.weight": torch.randn(7, 3, *ones)}, {"m": 6.0}
    )
    for noise in (0.0, 1e-4, 0.1, 1.0):
        tensors = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in one.tensors.items()}
        other = LoraWeights(tensors, {"m": 5.0} if noise == 0.1 else one.alphas)
        expected = (one.delta("m") - other.delta("m")).norm() / one.delta("m").norm()
        assert one.distance(other, "m") == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
        assert one.shape("m") == one.delta("m").shape


def test_distance_of_nothing_from_nothing_is_nothing() -> None:
    down, zero = torch.ones(2, 3), torch.zeros(4, 2)
    nothing = LoraWeights({"m.lora_A.weight": down, "m.lora_B.weight": zero}, {"m": 1.0})
    something = LoraWeights({"m.lora_A.weight": down, "m.lora_B.weight": zero + 1}, {"m": 1.0})
    assert nothing.distance(nothing, "m") == 0
    assert nothing.distance(something, "m") == float("inf")
    assert something.distance(nothing, "m") == 1


def test_one_alpha_for_all_changes_no_delta() -> None:
    torch.manual_seed(0)
    alphas = {"unet.a": 4.0, "unet.b": 4.0, "unet.c": 0.3, "text_encoder.text_model.d": 1.0}
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 3) for name in alphas}
    tensors |= {f"{name}.lora_B.weight": torch.randn(4, 2) for name in alphas}
    lora = LoraWeights(tensors, alphas)
    same = lora.with_one_alpha()
    assert same.alphas == {**alphas, "unet.c": 4.0}
    assert all(torch.allclose(same.delta(name), lora.delta(name)) for name in alphas)


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
