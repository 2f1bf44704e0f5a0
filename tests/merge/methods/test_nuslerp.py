import pytest
import torch

from merge.methods.nuslerp import NuSlerp
from merge.methods.slerp import Slerp
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import relative, tensors
from tuner.errors import ConfigError


@pytest.mark.parametrize("lengths", ["between", "free"])
def test_along_the_whole_tensor_it_is_slerp(lengths):
    a, b = tensors(30, 40, count=2)
    result = apply(NuSlerp(weights=(3.0, 1.0), lengths=lengths), a, b, dtype=torch.float64)
    assert same_bits(result, apply(Slerp(t=0.25, lengths=lengths), a, b, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 50), (6, 5, 3, 3), (6, 50, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_rows_each_filter_is_slerped_by_itself(shape, dtype):
    a, b = tensors(*shape, count=2)
    result = apply(NuSlerp(weights=(3.0, 1.0), per="rows"), a, b, dtype=dtype)
    for row in range(6):
        expected = apply(Slerp(t=0.25), a[row], b[row], dtype=torch.float64)
        assert relative(result[row], expected) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("shape", [(50, 6), (50, 2, 3, 1), (50, 6, 1, 1)])
def test_by_columns_each_input_is_slerped_by_itself(shape):
    a, b = tensors(*shape, count=2)
    result = apply(NuSlerp(weights=(3.0, 1.0), per="columns"), a, b, dtype=torch.float64).flatten(1)
    for column in range(6):
        expected = apply(Slerp(t=0.25), a.flatten(1)[:, column], b.flatten(1)[:, column], dtype=torch.float64)
        assert relative(result[:, column], expected) < 1e-14


@pytest.mark.parametrize("per", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(), (7,), (7, 1)])
def test_a_tensor_without_rows_is_slerped_whole(per, shape):
    if per == "columns" and shape == (7, 1):
        pytest.skip("one column is the whole")
    a, b = tensors(*shape, count=2)
    whole = apply(NuSlerp(), a, b)
    assert same_bits(apply(NuSlerp(per=per), a, b), whole)


def test_zero_and_opposite_rows_are_lerped_and_leave_the_others_alone():
    a, b = tensors(4, 50, count=2)
    a[0], b[1], b[2] = 0, 0, -2 * a[2]
    result = apply(NuSlerp(weights=(3.0, 1.0), per="rows"), a, b, dtype=torch.float64)
    for row in range(3):
        assert relative(result[row], 0.75 * a[row] + 0.25 * b[row]) < 1e-14
    assert relative(result[3], apply(Slerp(t=0.25), a[3], b[3], dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("per", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_inputs_are_left_bit_for_bit(per, dtype):
    a = tensors(30, 40, count=1, dtype=dtype)[0]
    assert same_bits(apply(NuSlerp(weights=(0.3, 0.9), per=per), a, a.clone(), dtype=dtype), a)


@pytest.mark.parametrize("per", ["tensor", "rows", "columns"])
def test_runs_do_not_matter(per):
    a, b = tensors(7, 100, count=2, dtype=torch.float32)
    method = NuSlerp(weights=(3.0, 1.0), per=per)
    assert same_bits(apply(method, a, b), apply(method, a, b, runs=[1, 150, 0, 249, 300]))


def test_a_weight_of_zero_gives_the_other_input():
    assert (NuSlerp(weights=(0.0, 2.0)).unchanged(), NuSlerp(weights=(0.3, 0.0)).unchanged()) == (1, 0)
    assert NuSlerp().unchanged() is None


def test_weights_are_two_and_say_something():
    with pytest.raises(ValueError, match="0 or more"):
        NuSlerp(weights=(1.0, -1.0))
    with pytest.raises(ValueError, match="all are 0"):
        NuSlerp(weights=(0.0, 0.0))
    with pytest.raises(ConfigError, match="weights: 3 of them for 2 inputs; give one for each, or none"):
        apply(NuSlerp(weights=(1.0, 1.0, 1.0)), *tensors(5, count=2))


@pytest.mark.parametrize(
    ("per", "options"),
    [
        ("tensor", {}),
        ("rows", {"nuslerp_flatten": False}),
        ("columns", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_mergekit_agrees_on_matrices(per, options):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = tensors(6, 50, count=2)
    peer = mergekit.merge_tensors([a, b], "nuslerp", parameters={"weight": [3.0, 1.0], **options})
    method = NuSlerp(weights=(3.0, 1.0), lengths="free", per=per)
    assert relative(apply(method, a, b, dtype=torch.float64), peer) < 1e-12


def test_mergekit_takes_the_lines_of_kernels_for_rows_of_a_convolution():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = tensors(6, 5, 3, 3, count=2)
    parameters = {"weight": [3.0, 1.0], "nuslerp_flatten": False}
    lines = mergekit.merge_tensors([a, b], "nuslerp", parameters=parameters)
    matrices = mergekit.merge_tensors([a.flatten(1), b.flatten(1)], "nuslerp", parameters=parameters)
    result = apply(NuSlerp(weights=(3.0, 1.0), lengths="free", per="rows"), a, b, dtype=torch.float64)
    assert relative(result.flatten(1), matrices) < 1e-12
    assert relative(result, lines) > 1e-2
