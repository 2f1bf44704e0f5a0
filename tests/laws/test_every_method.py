"""Laws of every training method: of each file in `tuner/methods`, with and without the text encoder."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toy
from tests.tuner.methods.variations import METHODS
from tests.tuner.methods.variations import every_method as variations
from tuner.methods.base import Method, ParameterGroup, Trainable
from tuner.methods.textual_inversion import TextualInversion
from tuner.optim.adamw import AdamW
from tuner.optim.base import torch_groups

every_method = pytest.mark.parametrize("method", [pytest.param(made, id=name) for name, made in variations().items()])


def everything(model: toy.ToyModel) -> list[Tensor]:
    """All parameters and buffers, in an order that does not change while training."""
    networks = model.networks.values()
    return list(chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks))


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_there_are_methods_to_be_judged():
    assert {"full", "lora", "loha", "lokr", "oft", "boft", "ia3"} <= set(METHODS.names())


@every_method
def test_attaching_changes_no_output(method: Method):
    model = toy.ToyModel()
    before = toy.outputs(model)
    method.attach(model, seed=0)
    if getattr(method, "init", "zero") == "pissa":  # the base and what is taken out of it are rounded apart
        torch.testing.assert_close(toy.outputs(model), before, rtol=1e-5, atol=1e-6)
    else:
        assert same(toy.outputs(model), before)


@every_method
def test_what_is_named_learns_and_nothing_else(method: Method):
    model = toy.ToyModel()
    trainable = method.attach(model, seed=0)
    named = {id(p): name for name, p in trainable.parameters().items()}
    assert {id(p) for p in everything(model) if p.requires_grad} == named.keys()
    before = [tensor.detach().clone() for tensor in everything(model)]
    toy.train(toy.trainer(model, trainable), 3)
    for tensor, was in zip(everything(model), before, strict=True):
        moved = not torch.equal(tensor, was)
        assert moved == (id(tensor) in named), named.get(id(tensor), "an unnamed tensor")


@every_method
def test_names_begin_with_their_components_and_groups_with_their_names(method: Method):
    model = toy.ToyModel()
    for group in method.attach(model, seed=0).groups:
        assert group.name in (model.denoiser, *model.text_encoders)
        assert group.parameters and all(name.startswith(model.prefixes[group.name]) for name in group.parameters)


@every_method
def test_it_says_whether_a_text_encoder_learns(method: Method):
    model = toy.ToyModel()
    groups = method.attach(model, seed=0).groups
    assert method.text_encoder == any(group.name in model.text_encoders for group in groups)


@every_method
def test_it_learns_on_fixed_noise(method: Method):
    model = toy.ToyModel()
    trainable = method.attach(model, seed=0)
    before = toy.fixed_loss(model)
    toy.train(toy.trainer(model, trainable, optimizer=AdamW(lr=3e-2)), 30)
    # the least that any can do: the few numbers of (IA)³, and words to a network that does not heed them much
    words_alone = isinstance(method, TextualInversion) and method.adapter is None
    assert toy.fixed_loss(model) < (0.995 if words_alone else 0.92) * before


@every_method
def test_it_goes_on_from_a_checkpoint_bit_for_bit(method: Method):
    def begin() -> Any:
        model = toy.ToyModel()
        return toy.trainer(model, method.attach(model, seed=0), micro_batch=3)

    whole, first, second = begin(), begin(), begin()
    toy.train(whole, 4)
    toy.train(first, 2)
    torch.rand(100)  # what happens to be drawn elsewhere
    kept = copy.deepcopy((dict(first.trainable.state()), first.optimizer.state_dict()))
    second.load_state(first.samples_seen, *kept)
    toy.train(second, 2)
    assert same(list(second.trainable.state().values()), list(whole.trainable.state().values()))


@every_method
def test_what_is_learned_does_not_depend_on_how_a_batch_is_split(method: Method):
    states: list[dict[str, Tensor]] = []
    for micro_batch in (8, 3):
        model = toy.ToyModel()
        trainer = toy.trainer(model, method.attach(model, seed=0), micro_batch=micro_batch, optimizer=Plain(lr=0.1))
        toy.train(trainer, 3)
        states.append(dict(trainer.trainable.state()))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Plain:
    """Gradient descent, which does not make much of rounding errors as Adam does of gradients that are nearly zero."""

    lr: float

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        return torch.optim.SGD(torch_groups(groups, self.lr))


@every_method
def test_its_state_carries_all_that_was_learned(method: Method):
    model, other = toy.ToyModel(), toy.ToyModel()
    trainable, fresh = method.attach(model, seed=0), method.attach(other, seed=1)
    toy.train(toy.trainer(model, trainable), 3)
    assert not same(toy.outputs(other), toy.outputs(model))
    fresh.load_state(copy.deepcopy(dict(trainable.state())))
    assert same(toy.outputs(other), toy.outputs(model))
    assert same(list(fresh.state().values()), list(trainable.state().values()))
    assert list(fresh.state()) == list(trainable.state())


@every_method
def test_its_state_is_the_learned_tensors_themselves(method: Method):
    trainable = method.attach(toy.ToyModel(), seed=0)
    parameters = trainable.parameters()
    for name, tensor in trainable.state().items():
        assert tensor.data_ptr() == parameters[name].data_ptr() and not tensor.requires_grad


@every_method
def test_another_state_is_refused_and_changes_nothing_of_other_names(method: Method):
    trainable: Trainable = method.attach(toy.ToyModel(), seed=0)
    state = {name: tensor.clone() for name, tensor in trainable.state().items()}
    name = next(iter(state))
    with pytest.raises(ValueError, match="1 tensors differ"):
        trainable.load_state({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match="1 tensors differ, among them another"):
        trainable.load_state({**state, "another": state[name]})
    with pytest.raises(ValueError, match="expected"):
        trainable.load_state({**state, name: state[name][..., :1].repeat_interleave(99, -1)})


@every_method
def test_equal_seeds_begin_alike(method: Method):
    torch.manual_seed(1)
    first = method.attach(toy.ToyModel(), seed=7).state()
    torch.manual_seed(2)
    second = method.attach(toy.ToyModel(), seed=7).state()
    assert list(first) == list(second) and same(list(first.values()), list(second.values()))


@every_method
def test_what_learns_is_float32_though_the_base_is_held_in_half(method: Method):
    model = toy.ToyModel()
    for network in model.networks.values():
        network.to(torch.bfloat16)
    trainable = method.attach(model, seed=0)
    assert {p.dtype for p in trainable.parameters().values()} == {torch.float32}
    (report,) = toy.train(toy.trainer(model, trainable), 1)
    assert report.loss > 0 and report.grad_norm > 0
    assert {p.dtype for p in trainable.parameters().values()} == {torch.float32}


@every_method
def test_a_network_that_learns_is_in_training_mode_and_no_other(method: Method):
    model = toy.ToyModel()
    learning = {group.name for group in method.attach(model, seed=0).groups}
    assert {name for name, network in model.networks.items() if network.training} == learning
