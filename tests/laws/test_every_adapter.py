"""Laws of every adapter: what it says it does to the weights is what it does, and none of its options is dead."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import toy
from tests.tuner.methods.variations import METHODS, every_method
from tuner.errors import ConfigError
from tuner.families._quantized import quantize
from tuner.methods._adapter import Adapter, AdapterTrainable
from tuner.plugins import read
from tuner.rng import Position
from tuner.weights.adapters.base import Change, Difference, Transform

ADAPTERS = {name: made for name, made in every_method().items() if isinstance(made, Adapter)}
KINDS = {made.kind: type(made) for made in ADAPTERS.values()}
every_adapter = pytest.mark.parametrize("method", [pytest.param(made, id=name) for name, made in ADAPTERS.items()])


def trained(method: Adapter, width: int = 8) -> tuple[toy.ToyModel, AdapterTrainable]:
    """After a few updates that are large enough to be seen."""
    model = toy.ToyModel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.networks["unet"] = model.networks["unet"] if width == 8 else toy.Denoiser(width)
    trainable = method.attach(model, seed=0)
    toy.train(toy.trainer(model, trainable), 4)
    return model, trainable


def moved(change: Change, weight: Tensor) -> Tensor:
    """The weight that a change makes of another, float64."""
    if isinstance(change, Difference):
        return weight.double() + change.dense().reshape(weight.shape)
    assert isinstance(change, Transform)
    return change.effect(weight.double())


def layer_of(model: toy.ToyModel, name: str) -> nn.Module:
    component = next(c for c, prefix in model.prefixes.items() if name.startswith(prefix))
    return model.networks[component].get_submodule(name.removeprefix(model.prefixes[component]))


def test_there_are_adapters_to_be_judged():
    assert KINDS.keys() == {"lora", "loha", "lokr", "oft", "boft", "ia3"}
    assert {kind: METHODS.find(kind) for kind in KINDS} == KINDS


@every_adapter
def test_a_layer_does_what_its_change_says_of_the_weight_that_it_had(method: Adapter):
    model, trainable = trained(method)
    fresh = toy.ToyModel()
    changes = trainable.changes()
    assert {name.removesuffix(".weight") for name in changes} == trainable.layers.keys()
    for name, change in changes.items():
        module = name.removesuffix(".weight")
        layer, base = layer_of(model, module), layer_of(fresh, module)
        own: Any = base.weight
        assert change.fits(own.shape)
        torch.testing.assert_close(trainable.weight(module), own, rtol=1e-5, atol=1e-6)  # as it was before
        x = torch.randn(2, 5, own.shape[1]) if isinstance(base, nn.Linear) else torch.randn(2, own.shape[1], 5, 5)
        with torch.no_grad():
            got, was = layer(x), base(x)
            base.double().weight.copy_(moved(change, own))  # pyright: ignore
            expected = base(x.double()).float()
        effect = (expected - was).abs().max()
        assert effect > 1e-4, "nothing was learned"
        assert (got - expected).abs().max() < 1e-3 * effect + 1e-6


@every_adapter
def test_its_changes_are_not_moved_by_what_is_learned_later(method: Adapter):
    model, trainable = trained(method)
    weights = {name: trainable.weight(name) for name in trainable.layers}
    probe = {f"{name}.weight": weight for name, weight in weights.items()}
    changes = trainable.changes()
    before = {name: moved(change, probe[name]) for name, change in changes.items()}
    toy.train(toy.trainer(model, trainable), 2)
    assert all(torch.equal(moved(change, probe[name]), before[name]) for name, change in changes.items())
    later = trainable.changes()
    assert all(not torch.equal(moved(later[name], probe[name]), before[name]) for name in changes)


COMMON: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "targets": ({}, {"targets": ["to_q"]}),
    "learning_rates": ({}, {"learning_rates": {"to_": 1e-3}}),
    "text_encoder": ({}, {"text_encoder": True}),
    "text_encoder_lr": ({"text_encoder": True}, {"text_encoder": True, "text_encoder_lr": 1e-4}),
}
CONV = {"conv": ({}, {"conv": True})}
RANKED = {
    **COMMON,
    "rank": ({"rank": 2}, {"rank": 1}),
    "alpha": ({"rank": 2}, {"rank": 2, "alpha": 1.0}),
    "conv_rank": ({"rank": 2}, {"rank": 2, "conv_rank": 2}),
    "conv_alpha": ({"rank": 2, "conv_rank": 2}, {"rank": 2, "conv_rank": 2, "conv_alpha": 1.0}),
    "ranks": ({"rank": 2}, {"rank": 2, "ranks": {"to_q": 1}}),
    "alphas": ({"rank": 2}, {"rank": 2, "alphas": {"to_q": 1.0}}),
}
TURNING = {
    **COMMON,
    **CONV,
    "block_size": ({}, {"block_size": 2}),
    "block_sizes": ({}, {"block_sizes": {"to_q": 2}}),
    "rescale": ({}, {"rescale": True}),
}
TUCKER = {"tucker": ({"rank": 1, "conv_rank": 1}, {"rank": 1, "conv_rank": 1, "tucker": True})}
OPTIONS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "lora": {
        **RANKED,
        "rslora": ({"rank": 4}, {"rank": 4, "rslora": True}),
        "dora": ({}, {"dora": True}),
        "init": ({"rank": 2}, {"rank": 2, "init": "pissa"}),
        "dropout": ({}, {"dropout": 0.5}),
        "lora_plus": ({}, {"lora_plus": 4.0}),
    },
    "loha": {**RANKED, **TUCKER},
    "lokr": {
        **RANKED,
        **TUCKER,
        "factor": ({"rank": 1}, {"rank": 1, "factor": 4}),
        "full_matrix": ({"rank": 1}, {"rank": 1, "full_matrix": True}),
        "decompose_both": ({"rank": 1, "factor": 4}, {"rank": 1, "factor": 4, "decompose_both": True}),
        "alpha": ({"rank": 1}, {"rank": 1, "alpha": 2.0}),
        "conv_alpha": ({"rank": 1, "conv_rank": 1}, {"rank": 1, "conv_rank": 1, "conv_alpha": 2.0}),
        "alphas": ({"rank": 1}, {"rank": 1, "alphas": {"to_q": 2.0}}),
    },
    "oft": TURNING,
    "boft": {
        **TURNING,
        "factors": ({"block_size": 2}, {"block_size": 2, "factors": 1}),
    },
    "ia3": {**COMMON, **CONV},
}
"""For each option: a config without it, and with it."""
CASES = [
    pytest.param(kind, *pair, id=f"{kind}.{name}") for kind, table in OPTIONS.items() for name, pair in table.items()
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_shown_to_do_something(kind):
    assert OPTIONS[kind].keys() == {field.name for field in fields(KINDS[kind])}


@pytest.mark.parametrize(("kind", "without", "with_it"), CASES)
def test_an_option_changes_what_is_learned(kind, without, with_it):
    def effect(options: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
        _, trainable = trained(read(KINDS[kind], options), width=32 if "oft" in kind else 8)
        changes = trainable.changes()
        return list(changes), [moved(c, trainable.weight(name.removesuffix(".weight"))) for name, c in changes.items()]

    (names, plain), (others, other) = effect(without), effect(with_it)
    assert names != others or any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["to_v"]}, "method.targets: 'to_v' is found in no layer"),
        ({"learning_rates": {"to_v": 1.0}}, "method.learning_rates: 'to_v' is found in no layer that learns"),
        ({"learning_rates": {"conv_in": 1.0}}, "method.learning_rates: 'conv_in' is found in no layer that learns"),
        ({"text_encoder": True, "targets": ["to_q"]}, "method.text_encoder: none of targets is found in text_encoder"),
    ],
)
def test_an_option_that_reaches_no_layer_is_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        read(KINDS[kind], options).attach(toy.ToyModel(), seed=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("loha", {"tucker": True}, "method.tucker: no convolution larger than 1x1 learns"),
        ("lokr", {"tucker": True}, "method.tucker: no convolution larger than 1x1 learns"),
        ("oft", {"conv": True, "targets": ["to_q"]}, "method.conv: none of targets is found in a convolution"),
        ("ia3", {"conv": True, "targets": ["to_q"]}, "method.conv: none of targets is found in a convolution"),
        ("oft", {"block_sizes": {"to_v": 4}}, "method.block_sizes: 'to_v' is found in no layer"),
        ("boft", {"block_sizes": {"unet": 0}}, "no layer is left to learn; widen targets or block_sizes"),
        ("lora", {"init": "pissa", "rank": 9}, "method.rank: .* has 8 singular values, PiSSA needs 9"),
    ],
)
def test_what_means_nothing_for_the_layers_is_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        read(KINDS[kind], options).attach(toy.ToyModel(), seed=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lora", {"dropout": 1.0}, "dropout must lie in"),
        ("lora", {"lora_plus": 0.0}, "lora_plus must be positive"),
        ("lora", {"dora": True, "init": "pissa"}, "choose one of them"),
        ("lora", {"learning_rates": {"to_q": 0.0}}, "learning rates must be positive"),
        ("lora", {"learning_rates": {"(": 1.0}}, "is no regular expression"),
        ("lokr", {"factor": 0}, "factor must be at least 1, or -1"),
        ("lokr", {"full_matrix": True, "alpha": 2.0}, "alpha has no effect with full_matrix"),
        ("lokr", {"full_matrix": True, "tucker": True}, "no effect with full_matrix"),
        ("oft", {"block_size": 1}, "block_size must be at least 2"),
        ("oft", {"block_sizes": {"to_q": 1}}, "block_sizes must be 0"),
        ("boft", {"block_size": 3}, "block sizes must be even"),
        ("boft", {"factors": 0}, "factors must be at least 1"),
        ("ia3", {"text_encoder_lr": 1e-4}, "text_encoder_lr has no effect"),
    ],
)
def test_values_that_mean_nothing_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        read(KINDS[kind], options)


def test_learning_rates_are_of_the_last_pattern_found_and_b_learns_faster():
    method = read(KINDS["lora"], {"lora_plus": 16.0, "learning_rates": {"to_": 1e-3, "1.to_q": 1e-5}})
    groups = method.attach(toy.ToyModel(), seed=0).groups
    peaks = {name: group.peak(1e-4) for group in groups for name in group.parameters}
    for name, peak in peaks.items():
        lr = 1e-5 if "1.to_q" in name else 1e-3 if "to_" in name else 1e-4
        assert peak == pytest.approx(lr * (16 if "lora_B" in name else 1)), name
    assert len(groups) == 6


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_chance_leaves_no_layer_out(kind, monkeypatch):
    """peft skips a layer where a random number is not above 0, which once in 2²⁴ times it is not."""
    model, _ = trained(read(KINDS[kind], {"rank": 2}))
    expected = toy.outputs(model)
    real = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: real(*shape, **options) * 0)
    assert all(torch.equal(a, b) for a, b in zip(toy.outputs(model), expected, strict=True))


def test_dropout_is_of_a_position_and_of_a_layer():
    model = toy.ToyModel()
    trainable = read(KINDS["lora"], {"dropout": 0.4}).attach(model, seed=0)
    (first, second, *_) = (layer.lora_dropout["default"] for name, layer in trainable.layers.items() if "to_q" in name)
    x, places = torch.ones(2, 50, 40), [Position(0, 1, 7), Position(0, 1, 8)]
    assert torch.equal(first(x), x)  # previews, validation
    trainable.at(places)
    both, again = first(x), first(x)
    assert torch.equal(both, again) and not torch.equal(both, second(x))
    assert abs(float((both == 0).float().mean()) - 0.4) < 0.02 and set(both.unique().tolist()) == {
        0.0,
        float(1 / 0.6 * torch.ones(())),
    }
    trainable.at(places[::-1])
    assert torch.equal(first(x), both.flip(0))
    trainable.at(places[1:])
    assert torch.equal(first(x[:1]), both[1:])
    assert first(torch.ones(3, 50, 40)).shape == (3, 50, 40)  # the parts of one long caption
    trainable.at([])
    assert torch.equal(first(x), x)


@pytest.mark.filterwarnings("ignore")
@every_adapter
def test_on_a_quantized_base_it_learns_or_says_that_it_cannot(method: Adapter):
    pytest.importorskip("bitsandbytes")
    model = toy.ToyModel()
    quantize(model.networks["unet"], "to_q", "nf4", torch.device("cpu"))
    before = toy.outputs(model)
    if method.dense:
        with pytest.raises(ConfigError, match=f"{method.kind} with these options needs the numbers .* are quantized"):
            method.attach(model, seed=0)
        return
    trainable = method.attach(model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(toy.outputs(model), before, strict=True))
    start = {name: p.detach().clone() for name, p in trainable.parameters().items()}
    toy.train(toy.trainer(model, trainable), 2)
    assert {p.dtype for p in trainable.parameters().values()} == {torch.float32}
    assert all(not torch.equal(p, start[name]) for name, p in trainable.parameters().items())
    assert trainable.changes().keys() == {f"{name}.weight" for name in trainable.layers}


def test_rotations_turn_as_many_outputs_as_divide_them():
    def blocks(kind: str, **options: Any) -> dict[str, tuple[int, ...]]:
        trainable = read(KINDS[kind], {"targets": ["to_q", "conv_out"], **options}).attach(toy.ToyModel(), seed=0)
        return {name.split(".")[-2]: tuple(p.shape) for name, p in trainable.parameters().items()}

    assert blocks("oft") == blocks("oft", block_size=3) == {"to_q": (4, 2, 2), "conv_out": (2, 2, 2)}
    assert blocks("boft") == {"to_q": (1, 1, 8, 8), "conv_out": (1, 1, 4, 4)}
    assert blocks("boft", block_size=6) == {"to_q": (2, 2, 4, 4), "conv_out": (1, 1, 4, 4)}
    assert blocks("boft", block_size=2) == {"to_q": (3, 4, 2, 2), "conv_out": (2, 2, 2, 2)}
    assert blocks("boft", block_size=2, factors=2) == {"to_q": (2, 4, 2, 2), "conv_out": (2, 2, 2, 2)}
