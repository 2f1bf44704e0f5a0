import pytest

from tests import toy
from tuner.methods.full import Full


def test_every_parameter_of_the_denoiser_learns_under_its_own_name():
    model = toy.ToyModel()
    (group,) = Full().attach(model, seed=0).groups
    assert set(group.parameters) == {f"unet.{name}" for name, _ in model.networks["unet"].named_parameters()}


def test_the_text_encoder_learns_where_asked_at_its_own_rate():
    model = toy.ToyModel()
    unet, text = Full(text_encoder=True, text_encoder_lr=1e-6).attach(model, seed=0).groups
    names = {f"text_encoder.text_model.{name}" for name, _ in model.networks["text_encoder"].named_parameters()}
    assert (unet.lr, text.lr, set(text.parameters)) == (None, 1e-6, names)
    assert [group.lr for group in Full(text_encoder=True).attach(toy.ToyModel(), seed=0).groups] == [None, None]


def test_a_learning_rate_for_what_does_not_learn_is_refused():
    with pytest.raises(ValueError, match="text_encoder_lr has no effect"):
        Full(text_encoder_lr=1e-6)
