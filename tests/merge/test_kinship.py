"""Whether models come from one base."""

import math

import pytest
import torch

from merge.kinship import LEAST_NUMBERS, NUMBERS, Kinship, same_base, sample
from tests.merge.models import NAMES, TEXT, VAE, network, saved, tuned
from tuner.weights.store import TensorMeta

BASE = network(1)


@pytest.fixture
def kinship(tmp_path):
    """`same_base` of sets of tensors."""

    def related(*models, **options):
        stores = [saved(tmp_path / f"{index}.safetensors", model) for index, model in enumerate(models)]
        return same_base(*stores, **options)

    return related


@pytest.mark.parametrize("amount", [0.0, 0.001, 0.01, 0.1, 0.4])
def test_fine_tunes_of_one_base_are_of_one_base(kinship, amount):
    found = kinship(tuned(BASE, 2, amount), tuned(BASE, 3, amount))
    assert found.kinship is Kinship.ONE_BASE
    assert found.components["unet"].relative == pytest.approx(math.sqrt(2) * amount / math.hypot(1, amount), rel=0.2)
    assert kinship(BASE, tuned(BASE, 2, amount)).components["unet"].cosine == pytest.approx(
        1 / math.hypot(1, amount), abs=0.02
    )


def test_networks_trained_apart_are_unrelated_though_their_scales_are_alike(kinship):
    found = kinship(BASE, network(2))
    assert found.kinship is Kinship.UNRELATED
    assert set(found.those(Kinship.UNRELATED)) == {"unet", "text_encoder", "vae"}
    assert "unet: unrelated (cosine" in str(found)


def test_a_network_whose_features_stand_in_another_order_is_unrelated(kinship):
    shuffled = {name: tensor[torch.randperm(len(tensor))] for name, tensor in BASE.items()}
    assert kinship(BASE, shuffled).kinship is Kinship.UNRELATED


def test_a_network_that_went_as_far_as_its_weights_are_long_is_far_apart(kinship):
    found = kinship(BASE, tuned(BASE, 2, 1.5))
    assert found.kinship is Kinship.DISTANT
    assert str(found).startswith("unet: far apart (cosine 0.5")


def test_one_component_that_was_trained_apart_is_enough_and_is_named(kinship):
    other = network(2)
    mixed = BASE | {name: other[name] for name in VAE}
    found = kinship(BASE, mixed)
    assert found.kinship is Kinship.UNRELATED
    assert found.those(Kinship.UNRELATED) == ["vae"]
    assert set(found.those(Kinship.ONE_BASE)) == {"unet", "text_encoder"}
    assert str(found).startswith("vae: unrelated")


def test_with_a_base_each_model_is_compared_with_it(kinship):
    one, other = tuned(BASE, 2, 0.1), tuned(BASE, 3, 0.1)
    assert kinship(one, other, BASE).kinship is Kinship.ONE_BASE
    assert kinship(one, other, network(2)).kinship is Kinship.UNRELATED
    assert kinship(one, network(2), BASE).kinship is Kinship.UNRELATED
    assert kinship(network(2), one, BASE).kinship is Kinship.UNRELATED


def test_without_enough_weights_nothing_is_said(kinship):
    few = {name: BASE[name] for name in TEXT[:2]}
    assert kinship(few, {name: network(2)[name] for name in TEXT[:2]}).kinship is Kinship.UNKNOWN
    assert kinship({"a": torch.ones(50, 50)}, {"b": torch.ones(50, 50)}).kinship is Kinship.UNKNOWN
    assert str(kinship({}, {})) == "too few weights in common to tell"


def test_weights_of_zero_say_nothing(kinship):
    zero = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    assert kinship(BASE, zero).kinship is Kinship.UNKNOWN


def test_a_sample_is_of_matrices_spread_over_each_component():
    metas = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in BASE.items()}
    chosen = sample(metas, metas, 5)
    assert {component: len(names) for component, names in chosen.items()} == {"unet": 5, "text_encoder": 4, "vae": 4}
    assert all(len(metas[name].shape) > 1 for names in chosen.values() for name in names)
    places = [NAMES.index(name) for name in chosen["unet"]]
    assert places == sorted(places)
    assert places[0] < 15 and places[-1] > 25
    small = {name: TensorMeta((1, LEAST_NUMBERS - 1), torch.float32) for name in NAMES}
    assert sample(small, small, 5) == {}


def test_only_the_first_numbers_of_large_tensors_are_read(kinship):
    """What comes after them may be anything."""
    names = NAMES[:1] + TEXT[:3]
    large = {name: torch.randn(2, NUMBERS) for name in names}
    changed = {name: torch.cat([tensor[:1], torch.randn(1, NUMBERS)]) for name, tensor in large.items()}
    assert kinship(large, changed).kinship is Kinship.ONE_BASE
