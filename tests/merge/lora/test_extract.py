"""A LoRA out of two checkpoints: recovered where there was one, certified where it is cut."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge.lora.delta import LoraDelta, bake
from merge.lora.extract import Wanted, extract
from merge.lora.ranks.budget import Budget
from merge.lora.ranks.energy import Energy
from merge.lora.ranks.fixed import Fixed
from merge.lora.save import save
from tests.tuner.weights.adapters.memory import FILES, K_CONV, K_LINEAR, K_POINT, NETWORK, Memory, drawn, network
from tuner.errors import DataError
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.file import parse_adapters, read_adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
LAYERS = [f"{name}.weight" for name, shape in NETWORK.items() if len(shape) > 1]


def tuned(kinds: list[str], dtype: torch.dtype = torch.float32) -> tuple[Memory, Memory]:
    """The network, and with LoRAs baked in."""
    base = network()
    new = base
    for kind in kinds:
        new = bake(new, parse_adapters(Memory(FILES[kind]), MODULES))
    return Memory({n: t.to(dtype) for n, t in base.items()}), Memory({n: t.to(dtype) for n, t in new.items()})


def moved(seed: int = 5) -> Memory:
    """Every tensor changed at random."""
    noise = network(seed=seed)
    return Memory({name: tensor + 0.01 * noise[name] for name, tensor in network().items()})


def differences(base: Memory, new: Memory) -> Mapping[str, Tensor]:
    return {name: new.tensors[name].double() - tensor.double() for name, tensor in base.tensors.items()}


def error(adapters, base: Memory, new: Memory, names: list[str]) -> float:
    """Of the named tensors together, computed densely."""
    exact = differences(base, new)
    apart = whole = 0.0
    for name in names:
        change = adapters.changes.get(name)
        kept = 0 if change is None else change.dense().reshape(exact[name].shape)
        apart += (exact[name] - kept).square().sum().item()
        whole += exact[name].square().sum().item()
    return (apart / whole) ** 0.5


@pytest.mark.parametrize(
    "kinds", [["lora"], ["locon"], ["lora", "locon", "locon of one point"], ["lora and a bias", "norm"]]
)
def test_a_lora_that_was_baked_in_is_found_again(kinds: list[str]) -> None:
    base, new = tuned(kinds)
    found = extract(base, new, Fixed(rank=3), Wanted())
    expected = {name for kind in kinds for name in parse_adapters(Memory(FILES[kind]), MODULES).changes}
    assert set(found.adapters.changes) == expected
    assert found.error < 1e-5 and not found.left_out
    assert found.unchanged == len(base.tensors) - len(expected)
    again = bake(network(), found.adapters)
    assert all(torch.allclose(again[name], tensor, atol=1e-5) for name, tensor in new.tensors.items())


def test_a_rank_that_is_too_small_loses_what_is_said() -> None:
    base, new = tuned(["lora", "locon"])
    for rank in (1, 2):
        found = extract(base, new, Fixed(rank=rank), Wanted())
        names = [part.name for part in found.parts]
        assert len(names) == 2
        for part in found.parts:
            assert part.rank == rank
            assert part.error == pytest.approx(error(found.adapters, base, new, [part.name]), rel=1e-4)
            assert part.norm == pytest.approx(differences(base, new)[part.name].norm().item(), rel=1e-9)
        assert found.error == pytest.approx(error(found.adapters, base, new, names), rel=1e-4)
        assert 0.1 < found.error < 1


def test_a_whole_fine_tune_is_extracted_layer_by_layer() -> None:
    base, new = Memory(network()), moved()
    found = extract(base, new, Fixed(rank=100), Wanted())
    assert set(found.adapters.changes) == set(base.tensors) and found.error < 1e-6
    for name, change in found.adapters.changes.items():
        assert isinstance(change, LowRank if name in LAYERS else Full)
        assert change.fits(base.tensors[name].shape)
        assert change.shape == tuple(base.tensors[name].shape)
    baked = bake(network(), found.adapters)
    assert all(torch.allclose(baked[name], tensor, atol=1e-6) for name, tensor in new.tensors.items())


def test_norms_and_biases_are_told_of_or_named_as_left_out() -> None:
    base, new = Memory(network()), moved()
    vectors = set(base.tensors) - set(LAYERS)
    without = extract(base, new, Fixed(rank=4), Wanted(vectors=False))
    assert set(without.adapters.changes) == set(LAYERS) and set(without.left_out) == vectors
    diffusers = extract(base, new, Fixed(rank=4), Wanted(dialect="diffusers"))
    assert set(diffusers.left_out) == vectors and "no word" in next(iter(diffusers.left_out.values()))
    norm = "unet.down_blocks.0.attentions.1.norm"
    kohya = extract(base, new, Fixed(rank=4), Wanted()).adapters.changes
    for name, is_norm in ((f"{norm}.weight", True), (f"{norm}.bias", True), ("unet.conv_in.bias", False)):
        change = kohya[name]
        assert isinstance(change, Full) and change.norm is is_norm and change.values.dtype == torch.float32


def test_what_no_lora_is_read_for_is_named_as_left_out() -> None:
    extra = {
        "vae.decoder.conv_in.weight": drawn(4, 4, 3, 3),
        "text_encoder.text_model.embeddings.token_embedding.weight": drawn(20, 8),
        "text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None],
        "unet.scale": drawn(1),
    }
    base = Memory({**network(), **extra})
    new = Memory({**moved().tensors, **{name: tensor + 1 for name, tensor in extra.items()}})
    found = extract(base, new, Fixed(rank=4), Wanted())
    assert set(found.left_out) == {name for name in extra if not name.endswith("position_ids")}
    assert found.unchanged == 1
    assert "kohya dialect has no word" in found.left_out["vae.decoder.conv_in.weight"]


def test_only_what_is_wanted_is_kept() -> None:
    base, new = Memory(network()), moved()
    found = extract(base, new, Fixed(rank=4), Wanted(keep=("unet.*",), drop=("*.conv1.*", "*.bias")))
    expected = {n for n in network() if n.startswith("unet.") and ".conv1." not in n and not n.endswith("bias")}
    assert set(found.adapters.changes) == expected
    assert set(found.left_out) == set(network()) - expected


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_energy_keeps_its_share_of_every_layer(share: float) -> None:
    base, new = Memory(network()), moved()
    found = extract(base, new, Energy(share=share), Wanted(vectors=False))
    for part in found.parts:
        assert part.error <= (1 - share) ** 0.5 + 1e-9
        assert (
            part.rank == 1
            or extract(base, new, Fixed(rank=part.rank - 1), Wanted(keep=(part.name,))).error
            > (1 - share) ** 0.5 - 1e-9
        )


@pytest.mark.parametrize("kilobytes", [14, 17, 20, 60])
@pytest.mark.parametrize("vectors", [True, False])
def test_the_file_is_no_larger_than_its_budget(kilobytes: int, vectors: bool, tmp_path: Path) -> None:
    base, new = Memory(network()), moved()
    wanted = Wanted(vectors=vectors)
    found = extract(base, new, Budget(megabytes=kilobytes / 1000), wanted)
    saved = save(tmp_path / "a.safetensors", found.adapters, "kohya", MODULES, wanted.dtype)
    assert saved.bytes <= kilobytes * 1000
    assert saved.bytes == (tmp_path / "a.safetensors").stat().st_size
    if kilobytes == 60:
        assert found.error < 1e-6
    if kilobytes == 14:
        assert found.error > 0.1


def test_a_larger_budget_has_a_smaller_error() -> None:
    base, new = Memory(network()), moved()
    found = [extract(base, new, Budget(megabytes=k / 1000), Wanted(vectors=False)) for k in (13, 14, 15, 17, 20)]
    errors = [error(one.adapters, base, new, LAYERS) for one in found]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


def test_a_layer_that_a_budget_leaves_out_is_named() -> None:
    base = Memory(network())
    new = dict(moved().tensors)
    new["unet.conv_in.weight"] = base.tensors["unet.conv_in.weight"] + 1e-6
    found = extract(base, Memory(new), Budget(megabytes=0.0125), Wanted(vectors=False))
    assert found.left_out["unet.conv_in.weight"] == "the rule keeps nothing of it"
    with pytest.raises(DataError, match=r"nothing to extract: .*the rule keeps nothing of it"):
        extract(base, Memory(new), Budget(megabytes=0.001), Wanted(vectors=False))


def test_the_same_checkpoints_give_the_same_file(tmp_path: Path) -> None:
    base, new = Memory(network()), moved()
    files = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for file in files:
        save(file, extract(base, new, Fixed(rank=2), Wanted()).adapters, "kohya", MODULES, torch.float16)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_saved_is_applied_to_the_base_as_the_error_says(tmp_path: Path) -> None:
    base, new = Memory(network()), moved()
    found = extract(base, new, Fixed(rank=2), Wanted())
    for dtype in (torch.float32, torch.float16):
        save(tmp_path / "a.safetensors", found.adapters, "kohya", MODULES, dtype)
        delta = LoraDelta(read_adapters(tmp_path / "a.safetensors", MODULES), base)
        exact = differences(base, new)
        apart = sum((exact[name] - delta.read(name)).square().sum().item() for name in delta.metas) ** 0.5
        whole = sum(difference.square().sum().item() for difference in exact.values()) ** 0.5
        assert apart / whole == pytest.approx(found.error, rel=1e-3)


def test_checkpoints_in_half_precision_are_subtracted_exactly() -> None:
    base, new = tuned(["lora"], torch.float16)
    found = extract(base, new, Fixed(rank=8), Wanted())
    (name,) = found.adapters.changes
    change = found.adapters.changes[name]
    assert isinstance(change, Difference)
    assert torch.allclose(change.dense(), differences(base, new)[name], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("unet.conv_in.weight"), "the tuned checkpoint lacks unet.conv_in.weight"),
        (lambda t: t.update({"unet.conv_out.weight": drawn(4, 4)}), "the base lacks unet.conv_out.weight"),
        (lambda t: t.update({"unet.conv_in.weight": drawn(8, 9, 3, 3)}), "differ in the shape of 1 tensors"),
        (lambda t: t["unet.conv_in.weight"].fill_(float("nan")), "unet.conv_in.weight: holds NaN"),
        (lambda t: t.update(network()), "the checkpoints are equal"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words: str) -> None:
    tensors = dict(moved().tensors)
    change(tensors)
    with pytest.raises(DataError, match=words):
        extract(Memory(network()), Memory(tensors), Fixed(rank=4), Wanted())


def test_names_are_kohyas() -> None:
    base, new = tuned(["lora", "locon", "locon of one point"])
    from tuner.weights.adapters.writing import to_tensors

    tensors = to_tensors(extract(base, new, Fixed(rank=3), Wanted()).adapters, "kohya", MODULES, torch.float16)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{name}.{part}" for name in (K_LINEAR, K_CONV, K_POINT) for part in parts}
    assert tensors[f"{K_CONV}.lora_down.weight"].shape == (3, 8, 3, 3)
    assert tensors[f"{K_CONV}.lora_up.weight"].shape == (16, 3, 1, 1)
    assert tensors[f"{K_POINT}.lora_down.weight"].shape == (3, 8, 1, 1)
    assert tensors[f"{K_LINEAR}.lora_up.weight"].shape == (16, 3)
    assert tensors[f"{K_LINEAR}.alpha"].item() == 3
