from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.lora.ranks.base import RankRule
from merge.lora.ranks.budget import Budget
from merge.lora.ranks.energy import Energy
from merge.lora.ranks.fixed import Fixed
from merge.lora.ranks.ratio import Ratio
from merge.lora.resize import resize
from merge.lora.workshop import Workshop
from tests.tuner.weights.adapters.memory import ADDED, FILES, K_LINEAR, LINEAR, NETWORK, Memory, drawn, network
from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
SHAPES = {name: tuple(tensor.shape) for name, tensor in network().items()}
DORAS = ["dora", "dora of inputs", "dora of a convolution"]


def read(kind: str) -> Adapters:
    return parse_adapters(Memory(FILES[kind]), MODULES)


def dense(change: Change) -> torch.Tensor:
    inner = change.inner if isinstance(change, Decomposed) else change
    assert isinstance(inner, Difference)
    return inner.dense()


@pytest.mark.parametrize("kind", [*ADDED, *DORAS])
def test_the_full_rank_changes_nothing(kind: str) -> None:
    before = read(kind)
    after = resize(before, Fixed(rank=100), shapes=SHAPES)
    assert set(after.adapters.changes) == set(before.changes) and after.error < 1e-7
    for name, change in after.adapters.changes.items():
        assert torch.allclose(dense(change), dense(before.changes[name]), rtol=1e-5, atol=1e-6)
        assert change.fits(SHAPES[name])
        inner = change.inner if isinstance(change, Decomposed) else change
        assert isinstance(inner, (LowRank, Full))
        if isinstance(before.changes[name], (LowRank, Full)):
            assert change is before.changes[name]
        if isinstance(change, Decomposed):
            assert change.magnitude is before.changes[name].magnitude  # pyright: ignore


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in (*ADDED, *DORAS) if kind not in ("full", "norm")])
def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_said(kind: str, rank: int) -> None:
    before = read(kind)
    after = resize(before, Fixed(rank=rank), shapes=SHAPES)
    for part in after.parts:
        exact, kept = dense(before.changes[part.name]), dense(after.adapters.changes[part.name])
        values = torch.linalg.svdvals(exact)
        assert part.error == pytest.approx((values[rank:].norm() / values.norm()).item(), rel=1e-9)
        assert ((exact - kept).norm() / exact.norm()).item() == pytest.approx(part.error, rel=1e-5)
        change = after.adapters.changes[part.name]
        inner = change.inner if isinstance(change, Decomposed) else change
        assert isinstance(inner, LowRank) and inner.rank == rank and inner.fits(SHAPES[part.name])
    assert len(after.parts) == 1 and after.error == pytest.approx(after.parts[0].error)


def several() -> Adapters:
    file = {**FILES["lora"], **FILES["locon"], **FILES["locon of one point"]}
    return parse_adapters(Memory(file), MODULES)


@pytest.mark.parametrize("rule", [Energy(share=0.7), Ratio(ratio=1.5), Budget(megabytes=0.0105)])
def test_rules_choose_for_each_layer(rule: RankRule) -> None:
    before = several()
    after = resize(before, rule, shapes=SHAPES)
    ranks = {part.name: part.rank for part in after.parts}
    assert set(ranks) == set(before.changes) and 0 < sum(rank or 0 for rank in ranks.values()) < 9
    errors = whole = 0.0
    for name, change in before.changes.items():
        kept = dense(after.adapters.changes[name]) if name in after.adapters.changes else 0
        errors += (dense(change) - kept).square().sum().item()
        whole += dense(change).square().sum().item()
    assert after.error == pytest.approx((errors / whole) ** 0.5, rel=1e-5)


def test_directions_that_do_nothing_are_not_kept() -> None:
    file = {
        f"{K_LINEAR}.lora_up.weight": torch.cat([drawn(16, 2), torch.zeros(16, 6)], 1),
        f"{K_LINEAR}.lora_down.weight": drawn(8, 8),
    }
    after = resize(parse_adapters(Memory(file), MODULES), Fixed(rank=7))
    change = after.adapters.changes[f"{LINEAR}.weight"]
    assert isinstance(change, LowRank) and change.rank == 2 and after.error < 1e-7


def test_names_need_not_be_resolved() -> None:
    after = resize(parse_adapters(Memory(FILES["lora"])), Fixed(rank=1))
    assert list(after.adapters.changes) == [f"{K_LINEAR}.weight"] and not after.adapters.resolved


@pytest.mark.parametrize("kind", ["loha", "lokr", "loha of a convolution", "lokr of a convolution, flat"])
def test_a_matrix_of_unknown_shape_is_not_taken_for_a_linear_layer(kind: str) -> None:
    with pytest.raises(DataError, match="the file does not say which; give its base"):
        resize(read(kind), Fixed(rank=1))


@pytest.mark.parametrize("kind", ["oft", "boft", "ia3 of outputs"])
def test_what_has_no_rank_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="has no rank; bake it"):
        resize(read(kind), Fixed(rank=1))


def test_a_rule_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="nothing is left"):
        resize(read("lora"), Budget(megabytes=0.0001))


@pytest.mark.parametrize("more", ["a picture in the header", "magnitudes"])
def test_a_budget_is_that_of_the_whole_file(more: str, tmp_path: Path) -> None:
    file: dict[str, torch.Tensor] = {}
    for layer in range(30):
        name = f"lora_unet_layer_{layer}"
        file |= {f"{name}.lora_up.weight": drawn(300, 8, seed=layer), f"{name}.lora_down.weight": drawn(8, 20)}
        file[f"{name}.alpha"] = torch.tensor(8.0)
        if more == "magnitudes":
            file[f"{name}.dora_scale"] = drawn(300, 1).abs()
    texts = {"modelspec.thumbnail": "x" * 60_000} if more != "magnitudes" else {}
    save_file(file, tmp_path / "large.safetensors", texts)
    workshop = Workshop.open([tmp_path / "large.safetensors"])
    smaller = resize(workshop.loras[0], Budget(megabytes=0.13), dtype=torch.float16)
    saved = workshop.save(tmp_path / "small.safetensors", smaller.adapters, dtype="float16")
    assert 90_000 < saved.bytes <= 130_000
