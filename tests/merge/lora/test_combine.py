import pytest
import torch

from merge.blocks import Blocks
from merge.coefficients import Varying, resolve
from merge.lora.combine import combine
from merge.lora.in_memory import apply
from merge.lora.ranks.energy import Energy
from merge.lora.ranks.fixed import Fixed
from merge.methods.add import Add
from merge.methods.base import MergeMethod, Space
from merge.methods.dare_linear import DareLinear
from merge.methods.lerp import Lerp
from merge.methods.ties import Ties
from tests.merge import memory
from tests.tuner.weights.adapters.memory import (
    CONV,
    FILES,
    K_CONV,
    K_LINEAR,
    K_POINT,
    LINEAR,
    NETWORK,
    NORM,
    POINT,
    Memory,
    drawn,
    network,
)
from tuner.errors import ConfigError, DataError
from tuner.plugins import Folder
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
SHAPES = {name: tuple(tensor.shape) for name, tensor in network().items()}


def lora(rank: int, alpha: float, seed: int, names: tuple[str, ...] = (K_LINEAR, K_CONV, K_POINT)) -> Adapters:
    file: dict[str, torch.Tensor] = {}
    shapes = {K_LINEAR: (16, 8), K_CONV: (16, 8, 3, 3), K_POINT: (8, 8, 1, 1)}
    for name in names:
        out, *rest = shapes[name]
        ones = (1,) * (len(rest) - 1)
        file[f"{name}.lora_up.weight"] = 1e-3 * drawn(out, rank, *ones, seed=seed)
        file[f"{name}.lora_down.weight"] = drawn(rank, *rest, seed=seed + 1)
        file[f"{name}.alpha"] = torch.tensor(alpha)
    return parse_adapters(Memory(file), MODULES)


def dense(adapters: Adapters, name: str) -> torch.Tensor:
    change = adapters.changes.get(name)
    if change is None:
        return torch.zeros(SHAPES[name], dtype=torch.float64).flatten(1)
    assert isinstance(change, Difference)
    return change.dense()


ONE, TWO, THREE = lora(3, 1.5, 0), lora(5, 20.0, 10), lora(1, 1.0, 20, (K_CONV,))
LAYERS = [f"{name}.weight" for name in (LINEAR, CONV, POINT)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, -0.7, 2.0), (0.3, 0.0, -1.0)])
def test_the_sum_is_the_sum_of_the_differences(weights: tuple[float, ...]) -> None:
    loras = (ONE, TWO, THREE)
    found = combine(loras, weights)
    assert set(found.adapters.changes) == set(LAYERS) and found.error == 0
    for name in LAYERS:
        expected = sum(weight * dense(one, name) for weight, one in zip(weights, loras, strict=True))
        assert (dense(found.adapters, name) - expected).norm() <= 1e-6 * expected.norm()
        change = found.adapters.changes[name]
        assert isinstance(change, LowRank) and change.shape == SHAPES[name] and change.scale == 1.0
        rank = sum(
            one.changes[name].rank  # pyright: ignore
            for weight, one in zip(weights, loras, strict=True)
            if weight and name in one.changes
        )
        assert change.rank == rank


def test_two_halves_of_one_lora_are_that_lora() -> None:
    found = combine([TWO, TWO], [0.5, 0.5])
    for name in LAYERS:
        assert torch.allclose(dense(found.adapters, name), dense(TWO, name), rtol=1e-5, atol=1e-9)


def test_a_lora_and_its_negative_are_nothing() -> None:
    found = combine([ONE, ONE], [1.0, -1.0])
    for name in LAYERS:
        assert dense(found.adapters, name).norm() < 1e-6 * dense(ONE, name).norm()


def test_factors_of_a_sum_are_of_about_one_size() -> None:
    for change in combine([ONE, TWO], [1.0, 0.01]).adapters.changes.values():
        assert isinstance(change, LowRank)
        for column, row in zip(change.product.left.T, change.product.right.flatten(1), strict=True):
            sizes = column.square().mean().sqrt().item() / row.square().mean().sqrt().item()
            assert 0.1 < sizes < 10


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_rank_is_cut_from_the_sum_and_not_from_the_factors(rank: int) -> None:
    weights = (1.0, -0.7)
    found = combine([ONE, TWO], weights, rule=Fixed(rank=rank))
    for part in found.parts:
        exact = weights[0] * dense(ONE, part.name) + weights[1] * dense(TWO, part.name)
        values = torch.linalg.svdvals(exact)
        assert part.error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-9)
        kept = dense(found.adapters, part.name)
        assert ((exact - kept).norm() / exact.norm()).item() == pytest.approx(part.error, abs=1e-6)


def test_differences_of_norms_and_biases_are_added_up() -> None:
    norm = parse_adapters(Memory(FILES["norm"]), MODULES)
    found = combine([norm, norm, ONE], [1.0, 0.5, 1.0])
    change = found.adapters.changes[f"{NORM}.weight"]
    assert isinstance(change, Full) and change.norm
    assert torch.allclose(change.values, 1.5 * FILES["norm"]["lora_unet_down_blocks_0_attentions_1_norm.w_norm"])
    assert set(found.adapters.changes) == {*LAYERS, f"{NORM}.weight", f"{NORM}.bias"}
    both = combine([norm, ONE], [2.0, 1.0], rule=Fixed(rank=1))
    assert set(both.adapters.changes) == {*LAYERS, f"{NORM}.weight", f"{NORM}.bias"}


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of whole factors"])
def test_other_kinds_are_added_up_where_a_rank_is_given(kind: str) -> None:
    other = parse_adapters(Memory(FILES[kind]), MODULES)
    name = f"{LINEAR}.weight"
    with pytest.raises(DataError, match="give a rank"):
        combine([ONE, other], [1.0, 0.5], shapes=SHAPES)
    for loras, weights in (([ONE, other], [1.0, 0.5]), ([other], [-2.0]), ([other, other], [1.0, 0.5])):
        found = combine(loras, weights, rule=Energy(share=1.0), shapes=SHAPES)
        expected = sum(weight * dense(one, name) for weight, one in zip(weights, loras, strict=True))
        assert torch.allclose(dense(found.adapters, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Ties(density=0.4),
        Ties(density=1.0, weights=(1.0, 0.5, 2.0)),
        DareLinear(density=0.5, seed=3),
        Ties(density=Varying(default=1.0, names=(("unet.*", 0.3),))),
    ],
)
def test_a_method_sees_the_differences_themselves(method: MergeMethod) -> None:
    loras, weights = (ONE, TWO, THREE), (1.0, -0.5, 2.0)
    found = combine(loras, weights, method=method, rule=Energy(share=1.0, most=1000))
    for name in LAYERS:
        deltas = [w * dense(one, name).reshape(SHAPES[name]) for w, one in zip(weights, loras, strict=True)]
        expected = memory.apply(resolve(method, name, Blocks(None)), *deltas, dtype=torch.float64, name=name)
        if name in found.adapters.changes:
            got = dense(found.adapters, name).reshape(SHAPES[name])
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
        else:
            assert not expected.any()


def test_what_a_method_makes_does_not_depend_on_how_products_are_split() -> None:
    turn = torch.linalg.qr(drawn(3, 3))[0]
    file: dict[str, torch.Tensor] = {}
    change = ONE.changes[f"{LINEAR}.weight"]
    assert isinstance(change, LowRank)
    file[f"{K_LINEAR}.lora_up.weight"] = change.product.left @ turn * 8
    file[f"{K_LINEAR}.lora_down.weight"] = turn.T @ change.product.right / 16
    turned = parse_adapters(Memory(file), MODULES)
    plain = lora(3, 1.5, 0, (K_LINEAR,))
    one, other = (combine([x, TWO], [1.0, 1.0], method=Ties(density=0.5), rule=Fixed(rank=4)) for x in (plain, turned))
    name = f"{LINEAR}.weight"
    assert torch.allclose(dense(one.adapters, name), dense(other.adapters, name), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", Folder("merge.methods").names())
def test_every_method_for_differences_can_be_driven_in_memory(name: str) -> None:
    kind = Folder("merge.methods").find(name)
    try:
        method = kind()
    except TypeError:
        return  # it has no defaults
    if any(space is Space.WEIGHT for space in method.takes):
        return
    tensors = [
        drawn(40, 30, seed=seed).double()
        for seed in range(max(2, len(method.takes)) if method.repeats else len(method.takes))
    ]
    expected = memory.apply(method, *tensors, dtype=torch.float64, name="a.weight")
    assert torch.equal(apply(method, "a.weight", tensors), expected)


def test_what_depends_on_its_base_is_not_added_up() -> None:
    for kind in ("dora", "oft", "ia3 of outputs"):
        with pytest.raises(DataError, match=r"LoRA 2: .* depends on the weights"):
            combine([ONE, parse_adapters(Memory(FILES[kind]), MODULES)], [1.0, 1.0])


def test_loras_for_different_models_are_not_combined() -> None:
    file = {f"{K_LINEAR}.lora_up.weight": drawn(16, 2), f"{K_LINEAR}.lora_down.weight": drawn(2, 9)}
    with pytest.raises(DataError, match=r"LoRA 2: .* made for different models"):
        combine([ONE, parse_adapters(Memory(file), MODULES)], [1.0, 1.0])


def test_files_that_spell_names_in_two_ways_need_their_base() -> None:
    kohya = parse_adapters(Memory(FILES["lora"]))
    diffusers = parse_adapters(
        Memory({f"{LINEAR}.lora_A.weight": drawn(2, 8), f"{LINEAR}.lora_B.weight": drawn(16, 2)})
    )
    with pytest.raises(DataError, match="give their base"):
        combine([kohya, diffusers], [1.0, 1.0])
    assert combine([kohya, kohya], [1.0, 1.0]).adapters.dialect == "kohya"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0]}, "1 for 2 LoRAs"),
        ({"weights": [1.0, float("nan")]}, "must be numbers"),
        ({"weights": [0.0, 0.0]}, "all of them are 0"),
        ({"method": Ties()}, "rank: missing"),
        ({"method": Add(), "rule": Fixed(rank=1)}, "merges checkpoints, not differences"),
        (
            {"method": Lerp(), "rule": Fixed(rank=1), "loras": [ONE, TWO, ONE], "weights": [1.0] * 3},
            "takes 2 differences, got 3",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combine(**{"loras": [ONE, TWO], "weights": [1.0, 1.0], **arguments})
