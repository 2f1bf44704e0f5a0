from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from merge.lora.save import save
from tests.tuner.weights.adapters.memory import ADDED, FILES, K_LINEAR, NETWORK, Memory, drawn
from tuner.errors import DataError
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.comparison import distance
from tuner.weights.adapters.file import Adapters, parse_adapters, read_adapters
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)


def read(kind: str) -> Adapters:
    return parse_adapters(Memory(FILES[kind]), MODULES)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_saved_reads_back_and_the_worst_error_is_said(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved = save(path, read(kind), "kohya", MODULES, dtype, lambda tensors: {"number": str(len(tensors))})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "number": str(len(list(file.keys())))}
    back = read_adapters(path, MODULES)
    worst = 0.0
    for name, change in read(kind).changes.items():
        if isinstance(change, Difference):
            other = back.changes[name]
            assert isinstance(other, Difference)
            worst = max(worst, ((change.dense() - other.dense()).norm() / change.dense().norm()).item())
    assert saved.worst == pytest.approx(worst, abs=1e-8) or kind not in ADDED
    assert saved.worst < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    assert saved.where in read(kind).changes and saved.bytes == path.stat().st_size


def test_the_distance_of_products_is_that_of_their_matrices() -> None:
    one, other = read("locon"), read("locon")
    (name,) = one.changes
    first = one.changes[name]
    file = {key: tensor * (1 + 0.01 * torch.rand(tensor.shape)) for key, tensor in FILES["locon"].items()}
    second = parse_adapters(Memory(file), MODULES).changes[name]
    assert isinstance(first, Difference) and isinstance(second, Difference)
    apart, size, _ = distance(first, second)
    assert apart == pytest.approx((first.dense() - second.dense()).norm().item(), rel=1e-10)
    assert size == pytest.approx(first.dense().norm().item(), rel=1e-10)
    assert distance(first, other.changes[name])[0] < 1e-12


def test_directions_that_cancel_each_other_do_not_make_a_file_wrong(tmp_path: Path) -> None:
    up, down = drawn(16, 3), drawn(3, 8)
    file = {
        f"{K_LINEAR}.lora_up.weight": torch.cat([up, -up + 1e-6 * drawn(16, 3, seed=4)], 1),
        f"{K_LINEAR}.lora_down.weight": torch.cat([down, down]),
    }
    saved = save(tmp_path / "a.safetensors", parse_adapters(Memory(file), MODULES), "kohya", MODULES, torch.float16)
    assert saved.worst > 0.01  # of a difference of nearly nothing


def test_what_half_precision_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    for factor, words in ((1e6, "too large for float16"), (1e-12, "write it in float32")):
        file = {**FILES["lora"], f"{K_LINEAR}.lora_up.weight": factor * drawn(16, 3)}
        adapters = parse_adapters(Memory(file), MODULES)
        path = tmp_path / f"{factor}.safetensors"
        with pytest.raises(DataError, match=words):
            save(path, adapters, "kohya", MODULES, torch.float16)
        assert save(path, adapters, "kohya", MODULES, torch.float32).worst < 1e-6


def test_what_does_not_read_back_as_it_was_is_not_left_behind_nor_put_in_an_older_files_place(tmp_path: Path) -> None:
    file = {f"{K_LINEAR}.lora_up.weight": 1e-9 * drawn(16, 3), f"{K_LINEAR}.lora_down.weight": drawn(3, 8)}
    path = tmp_path / "a.safetensors"
    for before in (None, b"before"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(DataError, match="write it in float32"):
            save(path, parse_adapters(Memory(file), MODULES), "kohya", MODULES, torch.float16)
        assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if before is None else [before])
