import torch

from tuner.rng import Position, generator_at


def draws(*position: int | str) -> torch.Tensor:
    return torch.rand(4, generator=generator_at(*position))


def test_a_place_has_its_own_draws_whatever_was_drawn_before():
    first = draws(0, "noise", 1, 2)
    draws(5)
    torch.manual_seed(3)
    assert torch.equal(draws(0, "noise", 1, 2), first)


def test_neighbouring_places_differ():
    places = [
        (0, "noise", 1, 2),
        (0, "noise", 2, 1),
        (1, "noise", 1, 2),
        (0, "flip", 1, 2),
        (0, "noise", 12),
        (0, "noise", "1", 2),
    ]
    assert len({tuple(draws(*place).tolist()) for place in places}) == len(places)


def test_a_positions_uses_do_not_disturb_each_other():
    at = Position(seed=1, epoch=2, sample=3)
    noise, time = at.generator("noise"), at.generator("timestep")
    torch.rand(1000, generator=time)
    assert torch.equal(torch.rand(4, generator=noise), draws(1, "noise", 2, 3))


def test_draws_never_change_between_versions():
    """What these numbers are is of no account, but runs that were begun have to find the same ones."""
    assert generator_at(0, "noise", 1, 2).initial_seed() == 5938781660159604271
    times = [int(torch.randint(1000, (), generator=generator_at(7, "timestep", 0, i))) for i in range(4)]
    assert times == [
        536,
        557,
        895,
        849,
    ]
