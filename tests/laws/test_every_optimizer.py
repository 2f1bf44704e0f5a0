"""Laws of every optimizer, the file of each in `tuner/optim`: it is built from groups, learns, resumes bit for bit."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tuner.methods.base import ParameterGroup
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.plugins import Folder
from tuner.training.checkpoint import Checkpoints, flatten, unflatten
from tuner.training.ema import Ema

OPTIMIZERS = Folder("tuner.optim")
NEEDS = {"adamw8bit": "bitsandbytes"}
"""What an optimizer needs besides the project's own dependencies."""


def built(name: str) -> Any:
    if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    return OPTIMIZERS.find(name)(lr=1e-2)


every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS.names())


def wide() -> toy.ToyModel:
    """A toy with tensors large enough (4096 elements) for 8-bit moments."""
    model = toy.ToyModel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.networks["unet"] = toy.Denoiser(width=96)
    return model


@every_optimizer
def test_groups_have_their_own_learning_rates_and_names(name):
    trainable = Full(text_encoder=True, text_encoder_lr=1e-5).attach(toy.ToyModel(), seed=0)
    groups = built(name).build(trainable.groups).param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-2), ("text_encoder", 1e-5)]
    for group, wanted in zip(groups, trainable.groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted.parameters.values()]


@every_optimizer
def test_what_does_not_decay_and_what_rests_stays_as_it_is(name):
    """The vectors of new words are such, and rest where they have no gradient."""
    kind = type(built(name))
    decaying, steady, resting = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3))
    groups = [
        ParameterGroup(name="unet", parameters={"a": decaying, "rests": resting}),
        ParameterGroup(name="text_encoder", parameters={"b": steady}, decays=False),
    ]
    optimizer = kind(lr=1e-2, weight_decay=0.5).build(groups)
    for _ in range(2):
        decaying.grad, steady.grad = torch.zeros(64, 64), torch.zeros(64, 64)
        optimizer.step()
    assert float(decaying.detach().max()) < 0.995
    assert torch.equal(steady, torch.ones(64, 64)) and torch.equal(resting, torch.ones(64, 64))


@every_optimizer
def test_it_learns_on_fixed_noise(name):
    optimizer, model = built(name), wide()
    trainer = toy.trainer(model, Full().attach(model, seed=0), optimizer=optimizer)
    before = toy.fixed_loss(model)
    toy.train(trainer, 30)
    assert toy.fixed_loss(model) < 0.8 * before


@every_optimizer
@pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(rank=64, conv_rank=4)], ids=["full", "lora"])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(name, method, tmp_path: Path):
    optimizer = built(name)

    def begin() -> Any:
        model = wide()
        return toy.trainer(model, method.attach(model, seed=0), optimizer=optimizer, ema=Ema(decay=0.9), micro_batch=3)

    def record(trainer: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        return flatten(
            [trainer.trainable.state(), trainer.optimizer.state_dict(), trainer.ema.average, trainer.ema.updates]
        )

    unbroken = begin()
    toy.train(unbroken, 7)

    broken = begin()
    toy.train(broken, 3)
    plain, tensors = flatten(broken.optimizer.state_dict())
    folder = Checkpoints(folder=tmp_path).save(
        broken.samples_seen,
        {"trainable": broken.trainable.state(), "optimizer": tensors, "ema": broken.ema.average},
        {"samples_seen": broken.samples_seen, "optimizer": plain, "ema_updates": broken.ema.updates},
    )
    saved = Checkpoints.open(folder)
    resumed = begin()
    resumed.load_state(
        saved.samples_seen,
        saved.tensors("trainable"),
        unflatten(saved.facts()["optimizer"], saved.tensors("optimizer")),
        saved.tensors("ema"),
        saved.facts()["ema_updates"],
    )
    assert resumed.samples_seen == 24
    toy.train(resumed, 4)

    (plain, tensors), (expected_plain, expected) = record(resumed), record(unbroken)
    assert json.dumps(plain) == json.dumps(expected_plain) and tensors.keys() == expected.keys()
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values()) == (name == "adamw8bit")
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


@every_optimizer
def test_a_resumed_run_keeps_the_settings_of_its_own_config(name):
    """What was saved is what the optimizer remembers; a changed weight decay is not silently the old one."""
    kind = type(built(name))
    model = toy.ToyModel()
    trainable = Full().attach(model, seed=0)
    before = toy.trainer(model, trainable, optimizer=kind(lr=1e-2, weight_decay=0.0))
    toy.train(before, 2)
    now = toy.trainer(model, trainable, optimizer=kind(lr=1e-3, weight_decay=0.5, betas=(0.5, 0.6)))
    now.load_state(before.samples_seen, before.trainable.state(), before.optimizer.state_dict())
    (report,) = toy.train(now, 1)
    assert report.lr == 1e-3
    assert {(group["weight_decay"], group["betas"]) for group in now.optimizer.param_groups} == {(0.5, (0.5, 0.6))}


@every_optimizer
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        ({"betas": (-0.1, 0.9)}, "betas must lie in"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_settings_outside_their_range_are_refused(name, setting, message):
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS.find(name)(**setting)
