"""Every kind of adapter against its formula, written out in float64."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.tuner.weights.adapters.memory import (
    ADDED,
    FILES,
    K_CONV,
    K_LINEAR,
    K_NORM,
    K_POINT,
    NETWORK,
    F,
    Memory,
    R,
    network,
)
from tuner.weights.adapters.base import Difference, Transform, trimmed
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.rotation import Butterfly, cayley
from tuner.weights.layouts.modules import Modules

MODULES = Modules(NETWORK)
S = F / R
Reference = Callable[[Callable[[str], Tensor], Tensor], Tensor]
"""W' from the file's tensors, by what follows the module's name, and W; both float64."""


def read(kind: str) -> Adapters:
    return parse_adapters(Memory(FILES[kind]), MODULES, place=kind)


def unit(w: Tensor, *others: int) -> Tensor:
    return w / w.square().sum(dim=others, keepdim=True).sqrt()


def rotations(blocks: Tensor, bound: Tensor | float) -> Tensor:
    q = blocks - blocks.mT
    if bound and q.norm() > bound:
        q = q / q.norm() * bound
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.inverse(eye - q)


def butterfly(blocks: Tensor, w: Tensor) -> Tensor:
    """Written as products of permutations and block diagonal matrices."""
    out = len(w)
    for layer, own in enumerate(rotations(blocks, 0)):
        far = 2**layer * own.shape[-1] // 2
        order = [base + i + far * half for base in range(0, out, 2 * far) for i in range(far) for half in (0, 1)]
        permutation = torch.eye(out, dtype=w.dtype)[order]
        w = permutation.T @ torch.block_diag(*own) @ permutation @ w
    return w


def lora(t: Callable[[str], Tensor]) -> Tensor:
    return t(".lora_up.weight").flatten(1) @ t(".lora_down.weight").flatten(1)


def kron_of_kernels(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([torch.kron(first, second[:, :, i, j]) for j in range(3)], -1) for i in range(3)], -2
    )


REFERENCES: Mapping[str, tuple[str, Reference]] = {
    "lora": (K_LINEAR, lambda t, w: w + S * lora(t)),
    "lora without alpha": (K_LINEAR, lambda t, w: w + lora(t)),
    "locon": (K_CONV, lambda t, w: w + S * lora(t).reshape(w.shape)),
    "locon of one point": (K_POINT, lambda t, w: w + S * lora(t).reshape(w.shape)),
    "locon with a middle": (
        K_CONV,
        lambda t, w: (
            w
            + S
            * torch.einsum(
                "op,pqkl,qi->oikl",
                t(".lora_up.weight").flatten(1),
                t(".lora_mid.weight"),
                t(".lora_down.weight").flatten(1),
            )
        ),
    ),
    "loha": (K_LINEAR, lambda t, w: w + S * (t(".hada_w1_a") @ t(".hada_w1_b")) * (t(".hada_w2_a") @ t(".hada_w2_b"))),
    "loha of a convolution": (
        K_CONV,
        lambda t, w: (
            w + S * ((t(".hada_w1_a") @ t(".hada_w1_b")) * (t(".hada_w2_a") @ t(".hada_w2_b"))).reshape(w.shape)
        ),
    ),
    "loha with cores": (
        K_CONV,
        lambda t, w: (
            w
            + S
            * torch.einsum("ijkl,ip,jr->prkl", t(".hada_t1"), t(".hada_w1_a"), t(".hada_w1_b"))
            * torch.einsum("ijkl,ip,jr->prkl", t(".hada_t2"), t(".hada_w2_a"), t(".hada_w2_b"))
        ),
    ),
    "lokr": (K_LINEAR, lambda t, w: w + S * torch.kron(t(".lokr_w1"), t(".lokr_w2_a") @ t(".lokr_w2_b"))),
    "lokr of whole factors": (K_LINEAR, lambda t, w: w + torch.kron(t(".lokr_w1"), t(".lokr_w2"))),
    "lokr of products": (
        K_LINEAR,
        lambda t, w: w + S * torch.kron(t(".lokr_w1_a") @ t(".lokr_w1_b"), t(".lokr_w2_a") @ t(".lokr_w2_b")),
    ),
    "lokr of a convolution": (K_CONV, lambda t, w: w + kron_of_kernels(t(".lokr_w1"), t(".lokr_w2"))),
    "lokr of a convolution, flat": (
        K_CONV,
        lambda t, w: w + S * kron_of_kernels(t(".lokr_w1"), (t(".lokr_w2_a") @ t(".lokr_w2_b")).reshape(4, 4, 3, 3)),
    ),
    "lokr with a core": (
        K_CONV,
        lambda t, w: (
            w
            + S
            * kron_of_kernels(
                t(".lokr_w1"), torch.einsum("ijkl,ip,jr->prkl", t(".lokr_t2"), t(".lokr_w2_a"), t(".lokr_w2_b"))
            )
        ),
    ),
    "full": (K_CONV, lambda t, w: w + t(".diff")),
    "norm": (K_NORM, lambda t, w: w + t(".w_norm")),
    "lora and a bias": (K_LINEAR, lambda t, w: w + S * lora(t)),
    "dora": (K_LINEAR, lambda t, w: t(".dora_scale") * unit(w + S * lora(t), 1)),
    "dora of inputs": (K_LINEAR, lambda t, w: t(".dora_scale") * unit(w + S * lora(t), 0)),
    "dora of a convolution": (
        K_CONV,
        lambda t, w: t(".dora_scale") * unit(w + S * lora(t).reshape(w.shape), 1, 2, 3),
    ),
    "oft": (K_LINEAR, lambda t, w: torch.block_diag(*rotations(t(".oft_blocks"), 0)).T @ w),
    "oft, bound": (
        K_CONV,
        lambda t, w: (
            t(".rescale")
            * (torch.block_diag(*rotations(t(".oft_blocks"), 16 * t(".alpha"))).T @ w.flatten(1)).reshape(w.shape)
        ),
    ),
    "boft": (K_LINEAR, lambda t, w: butterfly(t(".oft_blocks"), w)),
    "ia3 of outputs": (K_LINEAR, lambda t, w: (1 + t(".weight"))[:, None] * w),
    "ia3 of inputs": (K_CONV, lambda t, w: (1 + t(".weight")) * w),
    "glora": (
        K_LINEAR,
        lambda t, w: w + S * (w @ t(".a1.weight") @ t(".a2.weight") + t(".b1.weight") @ t(".b2.weight")),
    ),
    "glora of a convolution": (
        K_CONV,
        lambda t, w: (
            w
            + S * torch.einsum("oikl,ij->ojkl", w, t(".a1.weight").flatten(1) @ t(".a2.weight").flatten(1))
            + S * (t(".b1.weight").flatten(1) @ t(".b2.weight").flatten(1)).reshape(w.shape)
        ),
    ),
    "glora of another age": (
        K_LINEAR,
        lambda t, w: w + S * (w @ t(".a2.weight") @ t(".a1.weight") + t(".b2.weight") @ t(".b1.weight")),
    ),
    "set": (K_CONV, lambda t, w: t(".set_weight")),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_weight_becomes_what_the_formula_says(kind: str) -> None:
    spelling, reference = REFERENCES[kind]
    name = MODULES.find(spelling)
    weight = network()[f"{name}.weight"].double()
    change = read(kind).changes[f"{name}.weight"]
    assert change.fits(weight.shape)
    expected = reference(lambda suffix: FILES[kind][spelling + suffix].double(), weight)
    if isinstance(change, Difference):
        got = weight + change.dense().reshape(weight.shape)
        rows = torch.cat([change.rows(0, 5), change.rows(5, 5), change.rows(5, len(weight))])
        assert rows.dtype == torch.float32 and rows.shape == (len(weight), change.columns)
        assert torch.allclose(rows.double().reshape(weight.shape), expected - weight, rtol=1e-5, atol=1e-5)
    else:
        assert isinstance(change, Transform)
        got = change.effect(weight)
        single = change.effect(weight.float())
        assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, weight, atol=1e-2)


@pytest.mark.parametrize(("kind", "suffix"), [("full", ".diff_b"), ("norm", ".b_norm"), ("lora and a bias", ".diff_b")])
def test_a_bias_is_changed_by_its_difference(kind: str, suffix: str) -> None:
    spelling, _ = REFERENCES[kind]
    change = read(kind).changes[f"{MODULES.find(spelling)}.bias"]
    assert isinstance(change, Difference)
    assert torch.equal(change.dense()[:, 0], FILES[kind][spelling + suffix].double())


@pytest.mark.parametrize("kind", ADDED)
def test_a_convolution_with_the_sum_is_the_sum_of_convolutions(kind: str) -> None:
    """The kernels' order in the matrix is that of the weight, not only its size."""
    spelling, _ = REFERENCES[kind]
    name = f"{MODULES.find(spelling)}.weight"
    weight = network()[name].double()
    if weight.ndim != 4:
        return
    change = read(kind).changes[name]
    assert isinstance(change, Difference)
    delta = change.dense().reshape(weight.shape)
    x = torch.randn(1, weight.shape[1], 5, 5, dtype=torch.float64)
    parts = {suffix.removeprefix(spelling): tensor.double() for suffix, tensor in FILES[kind].items()}
    if ".lora_down.weight" not in parts:
        return
    y = functional.conv2d(x, parts[".lora_down.weight"])
    y = functional.conv2d(y, parts[".lora_mid.weight"]) if ".lora_mid.weight" in parts else y
    assert torch.allclose(functional.conv2d(x, delta), S * functional.conv2d(y, parts[".lora_up.weight"]))


def test_kinds_that_add_are_those_that_say_so() -> None:
    assert [kind for kind in FILES if read(kind).linear] == ADDED


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_a_rotation_keeps_every_length(kind: str) -> None:
    (change,) = read(kind).changes.values()
    assert isinstance(change, Transform)
    weight = torch.randn(16, 8, dtype=torch.float64)
    assert torch.allclose(change.effect(weight).norm(dim=0), weight.norm(dim=0))


def test_the_layers_of_a_butterfly_take_every_output_once() -> None:
    change = Butterfly(cayley(torch.zeros(3, 4, 4, 4, dtype=torch.float64)))
    for layer in range(3):
        assert sorted(change.order(layer).tolist()) == list(range(16))
    assert change.order(0).tolist()[:4] == [0, 2, 1, 3] and change.order(1).tolist()[:4] == [0, 4, 1, 5]
    weight = torch.randn(16, 8)
    assert torch.equal(change.effect(weight), weight)


def test_doras_of_a_row_of_zeros_stay_zero() -> None:
    spelling, _ = REFERENCES["dora"]
    file = {**FILES["dora"], f"{spelling}.lora_up.weight": torch.zeros(16, R)}
    (change,) = parse_adapters(Memory(file), MODULES).changes.values()
    assert isinstance(change, Transform)
    assert torch.equal(change.effect(torch.zeros(16, 8)), torch.zeros(16, 8))


@pytest.mark.parametrize("kind", FILES)
def test_a_change_fits_its_tensor_and_no_other(kind: str) -> None:
    for name, change in read(kind).changes.items():
        shape = network()[name].shape
        assert change.fits(shape)
        fitting = [other for other, tensor in network().items() if trimmed(tensor.shape) == trimmed(shape)]
        others = {tensor.shape for other, tensor in network().items() if other not in fitting}
        if kind.startswith(("oft", "boft", "ia3")):
            others = {other for other in others if other[0] != shape[0] and other[1:2] != shape[1:2]}
        assert others and not any(change.fits(other) for other in others)


@pytest.mark.parametrize("kind", ["lora", "locon of one point"])
def test_a_linear_layer_and_a_convolution_of_one_point_are_the_same(kind: str) -> None:
    (change,) = read(kind).changes.values()
    out, columns = change.shape[:2]
    assert change.fits((out, columns)) and change.fits((out, columns, 1, 1))
    assert not change.fits((out, columns, 3, 3)) and not change.fits((columns + 1, out))
