"""LoRA's options: each changes something, or is refused."""

import math
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight

from tests import toy
from tuner.errors import ConfigError
from tuner.families._quantized import Quantization, quantize
from tuner.methods._adapter import AdapterTrainable
from tuner.methods.lora import Lora
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.store import TensorMeta

PLAIN = tuple(f"unet.attentions.{i}.{layer}" for i in (0, 1) for layer in ("proj_in", "to_q", "to_k"))
"""The layers that learn by default: those of the attention blocks."""
SPATIAL = ("unet.conv_in", "unet.resnet.conv1")
TEXT = ("text_encoder.text_model.self_attn.q_proj",)


def attach(**options: Any) -> AdapterTrainable:
    return Lora(**options).attach(toy.ToyModel(), seed=0)


def shapes(trainable: AdapterTrainable) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer."""
    state = trainable.state()
    assert {name.rsplit(".lora_", 1)[0] for name in state} == trainable.layers.keys()
    ranks = {module: len(state[f"{module}.lora_A.weight"]) for module in trainable.layers}
    assert all(state[f"{module}.lora_B.weight"].shape[1] == rank for module, rank in ranks.items())
    return {module: (rank, trainable.layers[module].scaling["default"] * rank) for module, rank in ranks.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {PLAIN_: (16, 16.0) for PLAIN_ in PLAIN}),
        ({"rank": 3}, {name: (3, 3.0) for name in PLAIN}),
        ({"rank": 4, "alpha": 2.0}, {name: (4, 2.0) for name in PLAIN}),
        ({"rank": 4, "conv_rank": 2}, {**{name: (4, 4.0) for name in PLAIN}, **{name: (2, 2.0) for name in SPATIAL}}),
        (
            {"rank": 4, "alpha": 1.0, "conv_rank": 2, "conv_alpha": 0.5},
            {**{name: (4, 1.0) for name in PLAIN}, **{name: (2, 0.5) for name in SPATIAL}},
        ),
        (
            {"rank": 4, "alpha": 1.0, "conv_rank": 2},  # alpha is the linear layers'
            {**{name: (4, 1.0) for name in PLAIN}, **{name: (2, 2.0) for name in SPATIAL}},
        ),
        ({"rank": 4, "targets": (r"to_q$",)}, {f"unet.attentions.{i}.to_q": (4, 4.0) for i in (0, 1)}),
        (
            {"rank": 4, "targets": (r"attentions\.0\.to_q$", r"^unet\.conv_in$")},  # a convolution that is asked for
            {"unet.attentions.0.to_q": (4, 4.0), "unet.conv_in": (4, 4.0)},
        ),
        (
            {"rank": 4, "conv_rank": 2, "targets": (r"to_q$", "conv_in")},
            {**{f"unet.attentions.{i}.to_q": (4, 4.0) for i in (0, 1)}, "unet.conv_in": (2, 2.0)},
        ),
        (
            {"rank": 4, "alpha": 1.0, "ranks": {"to_q": 8, r"attentions\.1\.to_q": 2, "proj_in": 0, "conv_out": 5}},
            {
                "unet.attentions.0.to_q": (8, 8.0),
                "unet.attentions.1.to_q": (2, 2.0),  # the last pattern counts
                "unet.attentions.0.to_k": (4, 1.0),
                "unet.attentions.1.to_k": (4, 1.0),
                "unet.conv_out": (5, 5.0),
            },
        ),
        (
            {"rank": 4, "targets": ("to_q", "to_k"), "ranks": {"to_k": 2}, "alphas": {"to_": 3.0, r"0\.to_k": 0.5}},
            {
                "unet.attentions.0.to_q": (4, 3.0),
                "unet.attentions.1.to_q": (4, 3.0),
                "unet.attentions.0.to_k": (2, 0.5),
                "unet.attentions.1.to_k": (2, 3.0),
            },
        ),
        ({"rank": 4, "text_encoder": True}, {name: (4, 4.0) for name in (*PLAIN, *TEXT)}),
        ({"rank": 4, "text_encoder": True, "targets": ("text_encoder",)}, {
            "text_encoder.text_model.self_attn.q_proj": (4, 4.0),
        }),
    ]
)  # fmt: skip
def test_options_decide_which_layers_learn_at_which_rank_and_alpha(options, expected):
    assert shapes(attach(**options)) == expected


def test_alpha_is_the_rank_where_it_is_left_out():
    for rank in (1, 5, 64):
        assert set(shapes(attach(rank=rank)).values()) == {(rank, float(rank))}


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 1.0), (2, 8.0)])
def test_a_layers_update_is_alpha_over_rank_times_b_a(rank, alpha):
    model = toy.ToyModel()
    layers = {name: model.networks["unet"].get_submodule(name) for name in ("attentions.0.to_q", "conv_in")}
    trainable = Lora(rank=rank, alpha=alpha, conv_rank=rank, conv_alpha=alpha).attach(model, seed=0)
    state = trainable.state()
    rng = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=rng))
    for name, base in layers.items():
        adapted = model.networks["unet"].get_submodule(name)
        a, b = state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"]
        x = torch.randn(2, 3, 8) if b.ndim == 2 else torch.randn(2, 4, 5, 5)
        delta = b @ a if b.ndim == 2 else torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
        scaled = (alpha or rank) / rank * delta
        added = torch.nn.functional.linear(x, scaled) if b.ndim == 2 else torch.conv2d(x, scaled, padding=1)
        torch.testing.assert_close(adapted(x), base(x) + added, rtol=1e-5, atol=1e-5)


def test_a_begins_as_a_linear_layer_does_and_b_at_zero():
    state = attach(rank=8).state()
    for name, tensor in state.items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor[0].numel())
            assert tensor.abs().max() <= bound and tensor.std() > bound / math.sqrt(3) * 0.8


def test_initial_values_depend_on_the_layer_and_the_seed_alone():
    """Not on what else learns, so that runs with and without a layer can be compared."""
    name = "unet.attentions.1.to_q.lora_A.weight"
    everywhere, alone = attach(rank=4).state()[name], attach(rank=4, targets=("1.to_q",)).state()[name]
    other = Lora(rank=4).attach(toy.ToyModel(), seed=1).state()[name]
    assert torch.equal(everywhere, alone) and not torch.equal(everywhere, other)


def test_the_text_encoders_learning_rate_is_its_own():
    assert [group.lr for group in attach(text_encoder=True, text_encoder_lr=1e-5).groups] == [None, 1e-5]
    assert [group.lr for group in attach(text_encoder=True).groups] == [None, None]
    assert [group.name for group in attach().groups] == ["unet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("to_v",)}, "method.targets: 'to_v' is found in no layer; a layer's name is like unet.attentions"),
        ({"targets": ("to_q", "to_v")}, "method.targets: 'to_v' is found in no layer"),
        ({"targets": ("text_encoder",)}, "method.targets: 'text_encoder' is found in no layer"),
        ({"ranks": {"to_v": 4}}, "method.ranks: 'to_v' is found in no layer"),
        ({"alphas": {"to_v": 4.0}}, "method.alphas: 'to_v' is found in no layer that learns"),
        ({"alphas": {"conv_in": 4.0}}, "method.alphas: 'conv_in' is found in no layer that learns"),
        ({"conv_rank": 4, "targets": ("to_q",)}, "method.conv_rank: none of targets is found in a convolution"),
        ({"text_encoder": True, "targets": ("to_q",)}, "method.text_encoder: none of targets is found in text_encoder"),
        ({"ranks": {"unet": 0}}, "no layer is left to learn"),
    ],
)
def test_an_option_that_reaches_no_layer_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        attach(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"conv_rank": 0}, "conv_rank must be at least 1, got 0"),
        ({"ranks": {"to_q": -1}}, "ranks must be 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alphas": {"to_q": -1.0}}, "alpha must be positive, got -1.0"),
        ({"conv_alpha": 1.0}, "conv_alpha has no effect without conv_rank"),
        ({"text_encoder_lr": 1e-5}, "text_encoder_lr has no effect with text_encoder = false"),
        ({"targets": ("(",)}, "is no regular expression"),
        ({"ranks": {"*": 2}}, "is no regular expression"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


class Weights:
    """The weights of a network, as its files would give them."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.tensors = {name: p.detach().clone() for name, p in network.state_dict().items()}
        self.metas: dict[str, TensorMeta] = {}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def locate(self, name: str) -> None:
        return None


def quantized(kind: Quantization) -> tuple[toy.ToyModel, Weights]:
    """A model whose projections are quantized, and the weights that it had."""
    model = toy.ToyModel()
    weights = Weights(model.networks["unet"])
    quantize(model.networks["unet"], "to_[qk]", kind, torch.device("cpu"), weights)
    return model, weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_begins_with_what_is_nearest_of_its_rank_to_what_quantizing_has_lost(kind):
    """The distance is that of the smaller singular values (Eckart and Young 1936); of all ranks nothing is left."""
    pytest.importorskip("bitsandbytes")
    for rank in (1, 3, 6):
        model, weights = quantized(kind)
        method = Lora(rank=rank, alpha=2.0, init="loftq", targets=("to_q", "to_k"))
        trainable = method.attach(model, seed=0)
        for name, layer in trainable.layers.items():
            exact = weights.read(name.removeprefix("unet.") + ".weight").double()
            held = dequantize_module_weight(layer.base_layer).double()
            up, down = (getattr(layer, which)["default"].weight.detach().double() for which in ("lora_B", "lora_A"))
            left = exact - held - layer.scaling["default"] * up @ down
            values = torch.linalg.svdvals(exact - held)
            assert left.norm().item() == pytest.approx(values[rank:].norm().item(), abs=1e-6 * values[0].item())
            assert values[0] > 0


@pytest.mark.filterwarnings("ignore")
def test_loftq_brings_a_quantized_model_nearer_and_is_saved_for_the_base_as_it_was():
    pytest.importorskip("bitsandbytes")
    exact = toy.outputs(toy.ToyModel())[1]
    model, weights = quantized("nf4")
    far = (toy.outputs(model)[1] - exact).norm()
    trainable = Lora(rank=6, init="loftq", targets=("to_q", "to_k")).attach(model, seed=0)
    assert (toy.outputs(model)[1] - exact).norm() < 0.6 * far
    assert all(not change.dense().any() for change in trainable.changes().values() if isinstance(change, LowRank))
    toy.train(toy.trainer(model, trainable), 3)
    learned = toy.outputs(model)[1]
    plain = toy.ToyModel()
    for name, change in trainable.changes().items():
        assert isinstance(change, LowRank)
        changed = weights.read(name.removeprefix("unet.")).double() + change.dense()
        plain.networks["unet"].get_parameter(name.removeprefix("unet.")).data.copy_(changed)
    there = toy.outputs(plain)[1]
    assert (there - learned).norm() < 0.6 * far and (there - learned).norm() < (exact - learned).norm()


def test_loftq_without_quantizing_is_refused():
    with pytest.raises(ConfigError, match=r"method\.init: 'loftq' makes up for model\.quantize"):
        attach(init="loftq")


@pytest.mark.filterwarnings("ignore")
def test_loftq_of_too_high_a_rank_is_refused():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=r"method\.rank: .* LoftQ needs 9"):
        Lora(rank=9, init="loftq", targets=("to_q",)).attach(quantized("nf4")[0], seed=0)
