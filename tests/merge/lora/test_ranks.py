"""Laws of every rule in `merge/lora/ranks`, and each one's own."""

from collections.abc import Mapping

import pytest
import torch

from merge.lora.ranks.base import Layer, RankRule
from merge.lora.ranks.budget import Budget
from merge.lora.ranks.energy import Energy
from merge.lora.ranks.fixed import Fixed
from merge.lora.ranks.ratio import Ratio
from tuner.plugins import Folder

RULES = Folder("merge.lora.ranks")
EXAMPLES: Mapping[str, tuple[RankRule, RankRule]] = {
    "fixed": (Fixed(rank=3), Fixed(rank=6)),
    "energy": (Energy(share=0.5), Energy(share=0.99)),
    "ratio": (Ratio(ratio=2), Ratio(ratio=20)),
    "budget": (Budget(megabytes=0.02), Budget(megabytes=0.05)),
}
"""Of each rule, one that keeps little and one that keeps more."""


def layer(values: torch.Tensor, *, rest: float = 0.0, kernel: bool = False, cost: int = 1000, once: int = 500) -> Layer:
    return Layer(values.double(), rest, kernel, cost, once)


LAYERS = {
    "even": layer(torch.linspace(1, 0.5, 12)),
    "steep": layer(0.3 ** torch.arange(12.0)),
    "kernel": layer(0.8 ** torch.arange(12.0), kernel=True, cost=3000),
    "small": layer(1e-6 * torch.linspace(1, 0.5, 12)),
    "two of twelve": layer(torch.tensor([1.0, 0.5] + [0.0] * 10)),
    "nothing": layer(torch.zeros(12)),
    "known in part": layer(torch.linspace(1, 0.5, 12), rest=5.0),
}


def test_every_rule_is_tried() -> None:
    assert set(EXAMPLES) == set(RULES.names())


@pytest.mark.parametrize("name", RULES.names())
def test_a_rule_answers_for_every_layer_with_what_there_is(name: str) -> None:
    for rule in EXAMPLES[name]:
        ranks = rule.choose(LAYERS)
        assert set(ranks) == set(LAYERS)
        for key, rank in ranks.items():
            assert 0 <= rank <= LAYERS[key].known and rank <= rule.most
        assert ranks["nothing"] == 0 and ranks["two of twelve"] <= 2


@pytest.mark.parametrize("name", RULES.names())
def test_what_keeps_more_keeps_all_that_was_kept(name: str) -> None:
    less, more = (rule.choose(LAYERS) for rule in EXAMPLES[name])
    assert all(less[key] <= more[key] for key in LAYERS) and sum(less.values()) < sum(more.values())


@pytest.mark.parametrize("name", [name for name in RULES.names() if name != "budget"])
def test_scaling_a_layer_changes_nothing(name: str) -> None:
    scaled = {key: layer(3 * one.values, rest=9 * one.rest, kernel=one.kernel) for key, one in LAYERS.items()}
    for rule in EXAMPLES[name]:
        assert rule.choose(LAYERS) == rule.choose(scaled)


def test_convolutions_have_a_rank_of_their_own_if_one_is_said() -> None:
    assert Fixed(rank=5).choose(LAYERS)["kernel"] == 5
    ranks = Fixed(rank=5, conv_rank=2).choose(LAYERS)
    assert ranks["kernel"] == 2 and ranks["even"] == 5
    assert Fixed(rank=5, conv_rank=0).choose(LAYERS)["kernel"] == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_that_hold_the_share(share: float) -> None:
    ranks = Energy(share=share, most=1000).choose(LAYERS)
    for key in ("even", "steep", "kernel", "small"):
        squares = LAYERS[key].values.square()
        held = squares[: ranks[key]].sum() / squares.sum()
        before = squares[: ranks[key] - 1].sum() / squares.sum()
        assert before < share <= held + 1e-9
    assert Energy(share=0.9).choose(LAYERS)["known in part"] == 12  # the rest is not known direction by direction
    assert Energy(share=0.9, most=3).choose(LAYERS)["even"] == 3


def test_a_share_of_the_norm_is_its_square_of_the_energy() -> None:
    squares = LAYERS["kernel"].values.square()
    rank = Energy(share=0.81).choose(LAYERS)["kernel"]
    assert (squares[: rank - 1].sum() / squares.sum()).sqrt() < 0.9 <= (squares[:rank].sum() / squares.sum()).sqrt()


def test_ratio_keeps_what_is_not_smaller_than_its_part_of_the_largest() -> None:
    assert Ratio(ratio=2).choose(LAYERS)["even"] == 12
    assert Ratio(ratio=1).choose(LAYERS)["even"] == 1
    assert Ratio(ratio=12).choose(LAYERS)["steep"] == 3
    assert Ratio(ratio=2, most=4).choose(LAYERS)["even"] == 4


@pytest.mark.parametrize("megabytes", [0.0001, 0.0015, 0.004, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("spent", [0, 1000])
def test_a_budget_is_obeyed_and_used(megabytes: float, spent: int) -> None:
    ranks = Budget(megabytes=megabytes).choose(LAYERS, spent)
    cost = sum(
        rank * LAYERS[key].bytes_per_rank + (LAYERS[key].bytes_once if rank else 0) for key, rank in ranks.items()
    )
    assert cost <= max(0, megabytes * 1e6 - spent)
    if megabytes >= 0.1:
        assert all(ranks[key] == LAYERS[key].known for key in LAYERS)
    elif any(ranks.values()):
        cheapest = min(one.bytes_per_rank + one.bytes_once for one in LAYERS.values())
        assert cost + 3000 + 500 + cheapest > megabytes * 1e6 - spent


def test_a_budget_keeps_what_matters_most_for_each_byte() -> None:
    free = {key: layer(one.values, cost=one.bytes_per_rank, once=0) for key, one in LAYERS.items()}
    ranks = Budget(megabytes=0.01).choose(free)
    kept = [value**2 / one.bytes_per_rank for key, one in free.items() for value in one.values[: ranks[key]].tolist()]
    left = [
        value**2 / one.bytes_per_rank
        for key, one in free.items()
        for value in one.values[ranks[key] : ranks[key] + 1].tolist()
        if one.bytes_per_rank == 1000  # one that costs more may have had no room
    ]
    assert min(kept) >= max(left)
    assert ranks["small"] == 0


def test_the_best_of_equal_layers_are_the_largest_singular_values_of_all() -> None:
    layers = {name: layer(torch.rand(20).sort(descending=True).values, once=0) for name in "abc"}
    ranks = Budget(megabytes=0.025).choose(layers)
    best = torch.cat([one.values for one in layers.values()]).sort(descending=True).values[:25]
    for name, one in layers.items():
        assert ranks[name] == int((one.values >= best[-1]).sum())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Fixed, {"rank": 0}),
        (Fixed, {"rank": -1}),
        (Fixed, {"rank": 1, "conv_rank": -1}),
        (Energy, {"share": 0.0}),
        (Energy, {"share": 1.1}),
        (Energy, {"most": 0}),
        (Ratio, {"ratio": 0.5}),
        (Ratio, {"ratio": 2.0, "most": 0}),
        (Budget, {"megabytes": 0.0}),
        (Budget, {"megabytes": 1.0, "most": 0}),
    ],
)
def test_settings_without_a_meaning_are_refused(kind: type, fields: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        kind(**fields)
