"""Adapters as a store of differences: the dense formula, however it is cut, and baked."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch
from torch import Tensor

from merge.lora.delta import LoraDelta, bake
from merge.read import Ranged
from tests.tuner.weights.adapters.memory import ADDED, FILES, NETWORK, Memory, drawn, network
from tuner.errors import DataError
from tuner.weights.adapters import base as adapters_base
from tuner.weights.adapters.base import Difference, Transform
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
TARGET = Memory(network())


def read(kind: str) -> Adapters:
    return parse_adapters(Memory(FILES[kind]), MODULES)


def large(out: int = 300, columns: int = 700, rank: int = 5) -> tuple[Adapters, Memory]:
    """A LoRA whose rows come in several blocks, and what it is for."""
    file = {"lora_unet_a.lora_up.weight": drawn(out, rank), "lora_unet_a.lora_down.weight": drawn(rank, columns)}
    return parse_adapters(Memory(file), Modules(["unet.a"])), Memory({"unet.a.weight": drawn(out, columns)})


@pytest.mark.parametrize("kind", FILES)
def test_what_is_read_is_the_difference_that_the_adapter_makes(kind: str) -> None:
    adapters = read(kind)
    delta = LoraDelta(adapters, TARGET)
    assert isinstance(delta, Ranged)
    assert set(delta.metas) == set(adapters.changes)
    for name, change in adapters.changes.items():
        weight = network()[name].double()
        if isinstance(change, Difference):
            expected = change.dense().reshape(weight.shape)
        else:
            assert isinstance(change, Transform)
            expected = change.effect(weight) - weight
        got = delta.read(name)
        assert got.dtype == torch.float32 and got.shape == delta.metas[name].shape == weight.shape
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert delta.locate(name) is None


@pytest.mark.parametrize("kind", FILES)
def test_numbers_are_the_same_bits_however_a_tensor_is_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_base, "BLOCK", 20)  # several blocks even of these
    for name in read(kind).changes:
        whole = LoraDelta(read(kind), TARGET).read(name).reshape(-1)
        for length in (1, 7, 20, 21, 64, whole.numel()):
            delta = LoraDelta(read(kind), TARGET)
            pieces = [
                delta.read_range(name, start, min(start + length, whole.numel())).clone()
                for start in range(0, whole.numel(), length)
            ]
            assert torch.equal(torch.cat(pieces), whole)
        backwards = [delta.read_range(name, start, start + 1).item() for start in reversed(range(whole.numel()))]
        assert backwards[::-1] == whole.tolist()
        assert delta.read_range(name, 3, 3).numel() == 0


def test_a_large_tensor_has_the_same_bits_however_it_is_cut() -> None:
    adapters, target = large()
    change = adapters.changes["unet.a.weight"]
    assert isinstance(change, Difference) and 1 < change.block < 300
    whole = LoraDelta(adapters, target).read("unet.a.weight").reshape(-1)
    generator = torch.Generator().manual_seed(0)
    delta = LoraDelta(adapters, target)
    for _ in range(50):
        start, stop = sorted(torch.randint(0, whole.numel() + 1, (2,), generator=generator).tolist())
        assert torch.equal(delta.read_range("unet.a.weight", start, stop), whole[start:stop])
    dense = change.dense().reshape(-1)
    assert (whole.double() - dense).norm() < 1e-6 * dense.norm()


def test_threads_that_read_at_a_time_get_the_same_bits() -> None:
    adapters, target = large()
    moved = read("dora")
    both = Adapters({**adapters.changes, **moved.changes})
    store = Memory({**target.tensors, **network()})
    expected = {name: LoraDelta(both, store).read(name).reshape(-1) for name in both.changes}
    delta = LoraDelta(both, store)
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        barrier.wait()
        same = True
        for _ in range(30):
            for name, whole in expected.items():
                start, stop = sorted(torch.randint(0, whole.numel() + 1, (2,), generator=generator).tolist())
                same = same and torch.equal(delta.read_range(name, start, stop), whole[start:stop])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_lora_is_never_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, target = large()
    change = adapters.changes["unet.a.weight"]
    assert isinstance(change, Difference)
    asked: list[int] = []
    real = type(change).rows

    def rows(self: Difference, start: int, stop: int) -> Tensor:
        asked.append(stop - start)
        return real(self, start, stop)

    monkeypatch.setattr(type(change), "rows", rows)
    monkeypatch.setattr(type(change), "dense", None)
    delta = LoraDelta(adapters, target)
    for start in range(0, 300 * 700, 10_000):
        delta.read_range("unet.a.weight", start, start + 10_000)
    assert max(asked) == change.block and sum(asked) < 2 * 300


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("strength", [1.0, 0.0, -0.5])
def test_baking_adds_the_difference_times_the_strength(kind: str, strength: float) -> None:
    weights = network()
    baked = bake(weights, read(kind), strength)
    delta = LoraDelta(read(kind), TARGET)
    for name, weight in weights.items():
        assert baked[name].dtype == weight.dtype
        if name in delta.metas and strength:
            assert torch.allclose(baked[name], weight + strength * delta.read(name), rtol=1e-5, atol=1e-5)
            assert not torch.equal(baked[name], weight)
        else:
            assert torch.equal(baked[name], weight)
    assert all(torch.equal(network()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ADDED)
def test_baking_and_taking_off_again_gives_the_weights(kind: str) -> None:
    there = bake(network(), read(kind), 0.8)
    back = bake(there, read(kind), -0.8)
    assert all(torch.allclose(back[name], weight, atol=1e-5) for name, weight in network().items())


def test_baking_in_half_precision_rounds_once() -> None:
    weights = {name: weight.half() for name, weight in network().items()}
    for name, baked in bake(weights, read("locon")).items():
        exact = bake({name: weights[name].double() for name in weights}, read("locon"))[name]
        assert torch.equal(baked, exact.half())


@pytest.mark.parametrize("kind", FILES)
def test_a_lora_for_another_network_is_refused(kind: str) -> None:
    tensors = network()
    for name in read(kind).changes:
        del tensors[name]
    with pytest.raises(DataError, match="another model"):
        LoraDelta(read(kind), Memory(tensors))
    with pytest.raises(DataError, match="another model"):
        bake(tensors, read(kind))
    for name, change in read(kind).changes.items():
        wrong = {**network(), name: drawn(7, 3) if change.slot == "weight" else drawn(7)}
        with pytest.raises(DataError, match="do not fit"):
            LoraDelta(read(kind), Memory(wrong))
        with pytest.raises(DataError, match="a change for"):
            bake(wrong, read(kind))


def test_an_optional_bias_is_left_alone_where_there_is_none() -> None:
    file = {"q.ia3_l": drawn(8, 1)}
    adapters = parse_adapters(Memory(file), Modules(["q"]))
    assert set(adapters.changes) == {"q.weight", "q.bias"}
    weights = {"q.weight": drawn(8, 8)}
    assert set(LoraDelta(adapters, Memory(weights)).metas) == {"q.weight"}
    assert set(bake(weights, adapters)) == {"q.weight"}
    with_bias = bake({**weights, "q.bias": drawn(8)}, adapters)
    assert torch.allclose(with_bias["q.bias"], drawn(8, 1)[:, 0] * drawn(8))


def test_a_first_convolution_of_other_channels_is_the_plans_to_decide() -> None:
    file = {
        "lora_unet_conv_in.lora_up.weight": drawn(8, 2, 1, 1),
        "lora_unet_conv_in.lora_down.weight": drawn(2, 4, 3, 3),
    }
    adapters = parse_adapters(Memory(file), MODULES)
    delta = LoraDelta(adapters, Memory({"unet.conv_in.weight": drawn(8, 9, 3, 3)}))
    assert delta.metas["unet.conv_in.weight"].shape == (8, 4, 3, 3)
    assert prod(delta.read("unet.conv_in.weight").shape) == 8 * 4 * 9
    with pytest.raises(DataError, match="do not fit"):
        LoraDelta(adapters, Memory({"unet.conv_in.weight": drawn(8, 6, 3, 3)}))
