"""Layers that are one in single files: what comes apart does the same to the parts, and is joined to the same again."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.tuner.weights.adapters.memory import CONV, FILES, LINEAR, Memory, drawn, network
from tests.tuner.weights.adapters.networks import layers, modules
from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Transform
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.rows import Cut, apart, join, split, take, together
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Modules, Rows

SIZES = (4, 4, 8)
MIXING = ("dora of inputs", "boft")
"""Kinds in which every row depends on every other."""
KINDS = [kind for kind in FILES if kind not in (*MIXING, "norm", "locon of one point")]
"""Those of 16 rows."""


def changes(kind: str) -> Mapping[str, Change]:
    return parse_adapters(Memory(FILES[kind]), Modules.of_tensors(network())).changes


def after(change: Change | None, weight: Tensor) -> Tensor:
    if change is None:
        return weight
    if isinstance(change, Difference):
        return weight + change.dense().reshape(weight.shape)
    assert isinstance(change, Transform)
    return change.effect(weight)


@pytest.mark.parametrize("sizes", [SIZES, (8, 8), (3, 5, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_change_do_to_rows_what_the_whole_does(kind: str, sizes: tuple[int, ...]) -> None:
    for name, change in changes(kind).items():
        weight = network()[name].double()
        if kind.startswith("oft") and 3 in sizes:
            with pytest.raises(DataError, match="does not come apart"):
                split(change, sizes)
            continue
        parts = split(change, sizes)
        rows = weight.split(sizes)
        assert all(part is None or part.slot == change.slot for part in parts)
        got = torch.cat([after(part, own) for part, own in zip(parts, rows, strict=True)])
        assert torch.allclose(got, after(change, weight), rtol=1e-12, atol=1e-12)
        fitting = [part.fits(own.shape) for part, own in zip(parts, rows, strict=True) if part is not None]
        assert fitting and all(fitting)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_joined_are_the_whole_to_the_bit(kind: str) -> None:
    network_modules = Modules.of_tensors(network())
    for name, change in changes(kind).items():
        for sizes in (SIZES, (3, 5, 8)):
            if not (kind.startswith("oft") and 3 in sizes):
                again = join(split(change, sizes), sizes)
                if kind != "oft, bound":  # the bound is about all blocks, and is worked into them
                    old, new = (to_tensors(Adapters({name: own}), "kohya", network_modules) for own in (change, again))
                    assert set(old) == set(new) and all(torch.equal(old[key], new[key]) for key in old)
                weight = network()[name].double()
                assert torch.allclose(after(again, weight), after(change, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MIXING)
def test_what_mixes_rows_does_not_come_apart(kind: str) -> None:
    with pytest.raises(DataError, match="does not come apart by rows; bake it"):
        split(next(iter(changes(kind).values())), SIZES)


def low_rank(out: int, rank: int, alpha: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    file = {
        "m.lora_up.weight": drawn(out, rank, seed=seed).to(dtype),
        "m.lora_down.weight": drawn(rank, 8, seed=seed + 1).to(dtype),
        "m.alpha": torch.tensor(alpha),
    }
    (change,) = parse_adapters(Memory(file), Modules(["m"])).changes.values()
    assert isinstance(change, LowRank)
    return change


def test_separate_loras_are_one_of_blocks_whose_rank_and_alpha_are_the_sums_and_return_to_the_bit() -> None:
    parts = [low_rank(size, 3, 1.5, seed) for seed, size in enumerate(SIZES)]
    whole = join(parts, SIZES)
    assert isinstance(whole, LowRank)
    assert whole.rank == 9 and whole.scale * whole.rank == 4.5
    assert torch.allclose(whole.dense(), torch.cat([part.dense() for part in parts]), rtol=0, atol=0)
    for part, own in zip(split(whole, SIZES), parts, strict=True):
        assert isinstance(part, LowRank) and part.scale == own.scale
        assert torch.equal(part.product.left, own.product.left) and torch.equal(part.product.right, own.product.right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loras_of_several_ranks_and_alphas_are_one(dtype: torch.dtype) -> None:
    parts = [low_rank(4, 2, 1.0, 0, dtype), None, low_rank(8, 5, 3.3, 7, dtype)]
    whole = join(parts, SIZES)
    assert isinstance(whole, LowRank) and whole.rank == 7
    expected = torch.cat([torch.zeros(4, 8) if part is None else part.dense() for part in parts])
    assert (whole.dense() - expected).norm() <= 1e-7 * expected.norm()
    first, none, last = split(whole, SIZES)
    assert none is None and isinstance(first, LowRank) and isinstance(last, LowRank)
    assert (first.rank, last.rank) == (2, 5)


def test_a_lora_of_the_whole_keeps_its_down_in_every_part_and_its_rank_when_joined() -> None:
    whole = low_rank(16, 3, 1.5)
    parts = split(whole, SIZES)
    assert all(isinstance(part, LowRank) and part.product.right is whole.product.right for part in parts)
    again = join(parts, SIZES)
    assert isinstance(again, LowRank) and again.rank == 3
    assert torch.equal(again.product.left, whole.product.left)


def test_halves_are_swapped_and_swapped_back() -> None:
    change = low_rank(16, 3, 1.5)
    rows = (Rows("m", 8, 16), Rows("m", 0, 8))
    whole = together({"m": change}, rows)
    assert isinstance(whole, LowRank) and whole.rank == 3
    assert torch.equal(whole.dense(), torch.cat([change.dense()[8:], change.dense()[:8]]))
    back = apart(whole, rows)["m"]
    assert isinstance(back, LowRank) and torch.equal(back.product.left, change.product.left)


def test_rows_of_a_lokr_that_does_not_come_apart_are_written_only_as_the_whole() -> None:
    (change,) = changes("lokr").values()
    parts = split(change, (3, 5, 8))
    assert all(isinstance(part, Cut) for part in parts) and join(parts, (3, 5, 8)) is change
    for others in ([parts[0], None, parts[2]], [parts[1], parts[0], parts[2]]):
        with pytest.raises(DataError, match="do not make a whole one; make LoRAs"):
            join(others, (3, 5, 8))
    assert isinstance(take(take(change, 3, 16), 2, 4), Cut)
    assert torch.equal(
        after(take(take(change, 3, 16), 2, 4), torch.zeros(2, 8)).double(),
        after(change, torch.zeros(16, 8).double())[5:7],
    )


def half(kind: str) -> Change:
    return take(changes(kind)[f"{LINEAR if 'set' not in kind and 'inputs' not in kind else CONV}.weight"], 0, 8)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("lora", "loha", "a hadamard and lowrank are parts of one layer"),
        ("dora", None, "a decomposed of one of the layers that are one"),
        ("lokr", "lokr of whole factors", "LoKrs of layers that are one in single files do not make one"),
        ("set", None, "only some of the layers"),
        ("ia3 of inputs", None, "a rescaling of one of the layers"),
        ("oft", None, "a rotation of one of the layers"),
        ("glora", None, "a generalized of one of the layers"),
    ],
)
def test_what_cannot_be_one_is_refused_in_a_line(one: str, other: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        join([half(one), other and half(other)], (8, 8))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="for 16 rows, and the layer has 12"):
        split(changes("loha")[f"{LINEAR}.weight"], (4, 8))


BLOCK = "transformer.transformer_blocks.0."
WHOLES = {
    "tiny flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": [f"{BLOCK}attn.to_{part}" for part in "qkv"],
        "lora_unet_double_blocks_0_txt_attn_qkv": [f"{BLOCK}attn.add_{part}_proj" for part in "qkv"],
        "lora_unet_single_blocks_0_linear1": [
            *(f"transformer.single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
            "transformer.single_transformer_blocks.0.proj_mlp",
        ],
    },
    "tiny sd3": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": [f"{BLOCK}attn.to_{part}" for part in "qkv"],
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": [f"{BLOCK}attn2.to_{part}" for part in "qkv"],
        "lora_unet_joint_blocks_0_context_block_attn_qkv": [f"{BLOCK}attn.add_{part}_proj" for part in "qkv"],
    },
}


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("family", WHOLES)
def test_a_file_of_whole_layers_is_read_as_the_layers_of_diffusers(family: str, ends: tuple[str, str]) -> None:
    for spelling, parts in WHOLES[family].items():
        sizes = [layers(family)[part][0] for part in parts]
        columns = layers(family)[parts[0]][1]
        up, down = drawn(sum(sizes), 5), drawn(5, columns)
        dotted = next(name for name in modules(family).whole if f"lora_unet_{name.replace('.', '_')}" == spelling)
        for name in (spelling, f"diffusion_model.{dotted}", dotted, f"lycoris_{dotted.replace('.', '_')}"):
            file = {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
            found = parse_adapters(Memory(file), modules(family)).changes
            assert list(found) == [f"{part}.weight" for part in parts]
            for part, own in zip(found.values(), up.split(sizes), strict=True):
                assert torch.equal(after(part, torch.zeros(len(own), columns).double()), own.double() @ down.double())
        again = to_tensors(parse_adapters(Memory(file), modules(family)), "kohya", modules(family))
        assert torch.equal(again[f"{spelling}.lora_up.weight"], up) and torch.equal(
            again[f"{spelling}.lora_down.weight"], down
        )


def test_a_layer_that_is_told_of_in_two_ways_is_refused() -> None:
    names = ("lora_unet_double_blocks_0_img_attn_qkv", f"{BLOCK}attn.to_k")
    file = {}
    for name, rows in zip(names, (96, 32), strict=True):
        file |= {f"{name}.lora_down.weight": drawn(5, 32), f"{name}.lora_up.weight": drawn(rows, 5)}
    with pytest.raises(DataError, match="is in another layer of the file too"):
        parse_adapters(Memory(file), modules("tiny flux"))


def test_a_final_layer_has_shift_and_scale_the_other_way_round() -> None:
    for family in ("tiny flux", "tiny sd3"):
        (out, width) = layers(family)["transformer.norm_out.linear"]
        up, down = drawn(out, 5), drawn(5, width)
        name = "lora_unet_final_layer_adaLN_modulation_1"
        file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff_b": drawn(out)}
        found = parse_adapters(Memory(file), modules(family))
        turned = torch.cat([up[out // 2 :], up[: out // 2]])
        change, bias = (found.changes[f"transformer.norm_out.linear.{slot}"] for slot in ("weight", "bias"))
        assert torch.equal(after(change, torch.zeros(out, width).double()), turned.double() @ down.double())
        assert torch.equal(after(bias, torch.zeros(out).double()), drawn(out).roll(out // 2).double())
        again = to_tensors(found, "kohya", modules(family))
        assert all(torch.equal(again[key], tensor) for key, tensor in file.items())
