"""Tensors side by side, in runs."""

import pytest
import torch

from merge.methods.base import GRID
from merge.runs import Runs
from tests.merge.models import saved
from tuner.errors import DataError
from tuner.weights.views import Renamed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_runs_put_together_are_the_tensors_in_float64(tmp_path, dtype):
    tensors = [{"w": torch.randn(2, GRID // 2 + 7).to(dtype), "x": torch.randn(3, 5).to(dtype)} for _ in range(2)]
    stores = [saved(tmp_path / f"{index}.safetensors", one) for index, one in enumerate(tensors)]
    with Runs([*stores, Renamed(stores[0], {"w": "w", "x": "x"})]) as runs:
        for name in ("w", "x", "w"):
            parts = [[part.clone() for part in run] for run in runs.of(name)]
            assert [len(run[0]) for run in parts] == ([GRID, 14] if name == "w" else [15])
            for index, tensor in enumerate([tensors[0][name], tensors[1][name], tensors[0][name]]):
                assert torch.equal(torch.cat([run[index] for run in parts]), tensor.double().reshape(-1))


def test_a_limit_reads_the_first_numbers_only(tmp_path):
    store = saved(tmp_path / "a.safetensors", {"w": torch.arange(100.0)})
    with Runs([store]) as runs:
        assert [run[0].tolist() for run in runs.of("w", limit=3)] == [[0, 1, 2]]
        assert [len(run[0]) for run in runs.of("w", limit=1000)] == [100]


def test_a_tensor_without_numbers_has_no_runs(tmp_path):
    with Runs([saved(tmp_path / "a.safetensors", {"v_pred": torch.empty(0)})]) as runs:
        assert list(runs.of("v_pred")) == []


def test_memory_is_one_run_of_each_store(tmp_path):
    stores = [saved(tmp_path / f"{index}.safetensors", {"w": torch.zeros(4 * GRID)}) for index in range(2)]
    with Runs(stores) as runs:
        first = {tensor.data_ptr() for tensor in next(runs.of("w"))}
        assert all({tensor.data_ptr() for tensor in run} == first for run in runs.of("w"))


def test_a_file_that_became_shorter_is_refused(tmp_path):
    store = saved(tmp_path / "a.safetensors", {"w": torch.zeros(1000)})
    with Runs([store]) as runs:
        (tmp_path / "a.safetensors").write_bytes(b"")
        with pytest.raises(DataError, match="became shorter"):
            list(runs.of("w"))
