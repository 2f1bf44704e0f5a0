import pytest
import torch
from torch import Tensor

from merge.methods.top_k_tensor_sum import TopKTensorSum
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import CASES, random


def reference(a: Tensor, b: Tensor, width: float, offset: float) -> Tensor:
    """The description, number by number."""
    numbers, others = a.reshape(-1).tolist(), b.reshape(-1).tolist()
    count = len(numbers)
    ordered = sorted(numbers)
    by_size = sorted(range(count), key=lambda j: abs(ordered[j]))
    window = {by_size[k % count] for k in range(int(offset * count + 1e-6), int((offset + width) * count + 1e-6))}
    result = list(numbers)
    for j, place in enumerate(sorted(range(count), key=lambda i: others[i])):
        if j in window:
            result[place] = ordered[j]
    return torch.tensor(result, dtype=a.dtype).reshape(a.shape)


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_the_window_stand_in_the_second_models_order(name):
    a, b = CASES[name][:2]
    for width, offset in ((0.5, 0.0), (0.5, 0.5), (0.3, 0.9), (1.0, 0.4), (0.0, 0.5), (0.25, 1.0)):
        found = apply(TopKTensorSum(width=width, offset=offset), a, b)
        assert torch.equal(found, reference(a, b, width, offset)), (width, offset)


def test_wholly_it_has_the_numbers_of_the_first_and_the_order_of_the_second():
    a, b = random(12, 13, inputs=2)
    found = apply(TopKTensorSum(width=1), a, b)
    assert torch.equal(found.reshape(-1).sort().values, a.reshape(-1).sort().values)
    assert torch.equal(found.reshape(-1).argsort(), b.reshape(-1).argsort())


def test_without_a_window_it_is_the_first():
    a, b = random(12, 13, inputs=2)
    assert same_bits(apply(TopKTensorSum(width=0), a, b), a)
    assert TopKTensorSum(width=0).unchanged() == 0


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_with_itself_is_itself(name):
    a = CASES[name][0]
    assert torch.equal(apply(TopKTensorSum(width=0.5, offset=0.25), a, a), a)


def test_sd_mecha_agrees_but_takes_one_more_at_the_start_of_the_window():
    mecha = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.slicing")
    a, b = random(10, 10, inputs=2)
    peer = mecha.top_k_tensor_sum.__wrapped__

    def ours(width: float, offset: float = 0.0) -> Tensor:
        return apply(TopKTensorSum(width=width, offset=offset), a, b)

    assert torch.equal(ours(1), peer(a, b, 1.0, 0.0))
    assert torch.equal(ours(0.4), peer(a, b, 0.4, 0.0))
    assert torch.equal(ours(0.41, 0.19), peer(a, b, 0.4, 0.2)), "whose window begins one number earlier"


def test_what_it_cannot_do_is_refused():
    for field in ("width", "offset"):
        with pytest.raises(ValueError, match=f"{field} must be from 0 to 1"):
            TopKTensorSum(**{field: 1.1})
