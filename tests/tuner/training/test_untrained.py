"""The untrained model is there again, for every method, while another one learns."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests import toy
from tests.tuner.methods.variations import every_method as variations
from tuner.data.order import Showing
from tuner.diffusion.objective import Objective
from tuner.methods.base import Method
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.rng import Position
from tuner.training.untrained import keep_untrained


@pytest.mark.parametrize(
    "method",
    [*(pytest.param(made, id=name) for name, made in variations().items()), Lora(rank=2, init="pissa", dropout=0.5)],
)
def test_within_untrained_a_model_says_what_its_base_did_and_afterwards_what_it_has_learned(method: Method):
    model = toy.ToyModel()
    base = toy.outputs(model)
    trainable = method.attach(model, seed=0)
    keep_untrained(model, trainable)
    trainer = toy.trainer(model, trainable)
    toy.train(trainer, 3)
    learned, state = toy.outputs(model), {name: t.clone() for name, t in trainable.state().items()}
    assert not all(torch.equal(a, b) for a, b in zip(learned, base, strict=True))
    trainable.at([Position(0, 0, sample) for sample in range(3)])  # of which inputs would be dropped while training
    with model.untrained():
        for now, was in zip(toy.outputs(model), base, strict=True):
            torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-6)
    trainable.at(())
    assert all(torch.equal(a, b) for a, b in zip(toy.outputs(model), learned, strict=True))
    assert all(torch.equal(state[name], t) for name, t in trainable.state().items())


class EverySecond(Objective):
    """Every second sample's target is the base's."""

    def loss(self, model, batch, t=None):
        return super().loss(
            model, replace(batch, prior=torch.tensor([at.sample % 2 == 1 for at in batch.positions])), t
        )


def trained(method: Method, micro_batch: int, precision: str = "no") -> dict[str, torch.Tensor]:
    model = toy.ToyModel()
    trainable = method.attach(model, seed=0)
    keep_untrained(model, trainable)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    toy.train(
        toy.trainer(model, trainable, micro_batch=micro_batch, objective=EverySecond(), accelerator=accelerator), 3
    )
    return {name: t.clone() for name, t in trainable.state().items()}


@pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(rank=2, text_encoder=True)], ids=str)
def test_an_update_with_priors_is_one_however_it_is_split(method):
    whole, split = trained(method, 8), trained(method, 1)
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", [Full(), Lora(rank=2)], ids=str)
def test_autocast_takes_the_weights_that_learn_for_the_loss_and_the_kept_ones_for_the_target(method):
    """It remembers rounded weights by where they are, and the two are at one place in turn."""
    model = toy.ToyModel()
    trainable = method.attach(model, seed=0)
    keep_untrained(model, trainable)
    with torch.no_grad():
        for p in trainable.parameters().values():
            p.add_(0.05)
    batch = toy.batch([Showing(0, 0), Showing(0, 1)])
    batch = replace(batch, conditioning=model.encode_text(batch.captions).each(torch.Tensor.detach))
    with torch.autocast("cpu", torch.bfloat16):
        plain = Objective().loss(model, batch)
        with torch.no_grad(), model.untrained():
            untrained = Objective().loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        both = Objective().loss(model, replace(batch, prior=torch.tensor([True, False])))
        both.weighted.sum().backward()
    assert torch.equal(both.plain[1], plain.plain[1]) and not torch.equal(untrained.plain, plain.plain)
    assert both.plain[0] > 0
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable.parameters().values())
